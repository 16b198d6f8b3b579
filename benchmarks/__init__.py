"""Speed and memory of the operators against what people would run otherwise."""
