"""The commands of `rtpurbo`: detect, adapt, calibrate, eval, generate, bench, demo, info."""

from rtpurbo.commands import adapt, bench, calibrate, demo, detect, evaluate, generate, info
from rtpurbo.commands.app import app

app.command()(detect.detect)
app.command()(adapt.adapt)
app.command()(calibrate.calibrate)
app.command("eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(bench.bench)
app.command()(demo.demo)
app.command()(info.info)

__all__ = ["app"]
