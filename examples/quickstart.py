"""From a dense model to a saved sparse one: `python examples/quickstart.py MODEL OUTPUT`.

The defaults are for a 135M model on a CPU; a large model takes --length 32768 --window 8192 and a
few hundred steps of each stage.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rtpurbo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("output", help="folder of the sparse model")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a training sequence")
    parser.add_argument("--window", type=int, default=512, help="window of the local heads")
    parser.add_argument("--steps", type=int, default=20, help="steps of each stage")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = rtpurbo.data.prose()

    heads = rtpurbo.detect_heads(model, tokenizer, length=arguments.length, num_documents=2)
    rtpurbo.sparsify(model, rtpurbo.RTPurboConfig(heads=heads, window=arguments.window))
    tokens = rtpurbo.data.retrieval_sequences(tokenizer, texts, arguments.length, count=8)
    rtpurbo.train_index(model, tokens, steps=arguments.steps, updates=4, rows=256)
    samples = rtpurbo.data.excerpts(tokenizer, texts, arguments.length, count=arguments.steps)
    rtpurbo.distill(model, samples, steps=arguments.steps, batch_size=1)

    report = rtpurbo.evaluate(
        model, tokenizer, ["niah", "mk8"], [arguments.length], prompts=2, window=arguments.window
    )
    print(report)
    rtpurbo.save_pretrained(model, arguments.output, tokenizer)
    model, tokenizer = rtpurbo.from_pretrained(arguments.output)
    inputs = tokenizer("The window of a local head", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]))
    print(rtpurbo.stats(model))


if __name__ == "__main__":
    main()
