"""Every command and every option, on tiny models."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import rtpurbo
from rtpurbo.commands import app
from rtpurbo.patching import state
from tests.front import DOCUMENTS, ROLES, network, saved
from tests.tokenizers import byte_tokenizer


def run(*arguments, code=0, stdin=None):
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout if code == 0 else result.output


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(DOCUMENTS[0])
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "sparse", sparse=True)


def test_every_command_has_help():
    listed = run("--help")
    for command in ("detect", "adapt", "calibrate", "eval", "generate", "bench", "demo", "info"):
        assert command in listed
        assert "Usage" in run(command, "-h")


def test_detect_writes_every_format(dense, texts, tmp_path):
    out = tmp_path / "heads.json"
    before = old_file(tmp_path / "rtp.json")
    printed = run(
        "detect", dense, "--output", out, "--length", 200, "--documents", 2, "--needle-length", 8,
        "--share", 0.25, "--texts", texts, "--plot", tmp_path / "heads.png", "--rtp-llm",
        tmp_path / "rtp.json", "--duo-attention", tmp_path / "duo", "--dtype", "float32",
        "--seed", 3,
    )  # fmt: skip
    heads = rtpurbo.HeadMap.load(out)
    again = rtpurbo.detect_heads(
        network(), byte_tokenizer(), documents=DOCUMENTS, length=200, num_documents=2,
        needle_length=8, share=0.25, seed=3,
    )  # fmt: skip
    assert heads == again and int(heads.roles.sum()) == 2
    assert "2 of 2x4 heads retrieve" in printed.replace("\n", " ")
    assert (tmp_path / "heads.png").stat().st_size > 1000
    config = json.loads((tmp_path / "rtp.json").read_text())
    assert torch.equal(rtpurbo.HeadMap.from_headwise_config(config).roles, heads.roles)
    assert before.read_text() == "old"
    assert (tmp_path / "duo" / "full_attention_heads.tsv").is_file()


def test_detect_by_threshold(dense, texts, tmp_path):
    command = ["detect", dense, "--length", 200, "--documents", 1, "--needle-length", 8,
               "--texts", texts]  # fmt: skip
    run(*command, "-o", tmp_path / "all.json", "--threshold", 0)
    assert rtpurbo.HeadMap.load(tmp_path / "all.json").roles.all()
    run(*command, "-o", tmp_path / "none.json", "--threshold", 1)
    assert not rtpurbo.HeadMap.load(tmp_path / "none.json").roles.any()


def test_adapt_passes_every_setting_on(dense, texts, tmp_path):
    rtpurbo.HeadMap.from_roles(ROLES, kv_heads=2).save(tmp_path / "heads.json")
    run(
        "adapt", dense, "-o", tmp_path / "out", "--heads", tmp_path / "heads.json", "--window", 24,
        "--sinks", 2, "--index", "full", "--index-dim", 4, "--top-p", 0.8, "--min-tokens", 5,
        "--recent", 7, "--block-size", 16, "--prefill", "sparse", "--share-index-keys",
        "--exact-sets", "--index-bits", 8, "--index-steps", 0, "--distill-steps", 0, "--texts",
        texts,
    )  # fmt: skip
    model, tokenizer = rtpurbo.from_pretrained(tmp_path / "out")
    config = rtpurbo.patching.state(model).config
    expected = {
        "window": 24, "sinks": 2, "index": "full", "index_dim": 4, "top_p": 0.8, "min_tokens": 5,
        "recent": 7, "block_size": 16, "prefill": "sparse", "share_index_keys": True,
        "index_bits": 8, "exact_sets": True,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert torch.equal(config.heads.roles, ROLES) and tokenizer is not None


def test_adapt_passes_refine_on(dense, texts, tmp_path):
    command = ["adapt", dense, "-o", tmp_path / "out", "--share", 0.25, "--texts", texts]
    command += ["--index-steps", 0, "--distill-steps", 0, "--length", 256, "--refine"]
    run(*command, "--index-bits", 4)
    config = rtpurbo.patching.state(rtpurbo.from_pretrained(tmp_path / "out")[0]).config
    assert config.refine and config.index_bits == 4


@pytest.mark.parametrize("lora", [0, 2])
def test_adapt_trains_both_stages_and_resumes(dense, texts, tmp_path, lora):
    command = [
        "adapt", dense, "-o", tmp_path / "out", "--share", 0.25, "--window", 24, "--index-dim", 4,
        "--length", 256, "--sequences", 3, "--index-steps", 2, "--index-lr", 1e-2, "--rows", 16,
        "--distill-steps", 2, "--distill-lr", 1e-3, "--batch-size", 1, "--lora", lora,
        "--work", tmp_path / "work", "--texts", texts, "--seed", 1,
    ]  # fmt: skip
    printed = run(*command)
    assert "kl_before" in printed and "loss_last" in printed
    steps = (tmp_path / "work" / "index" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2
    model, _ = rtpurbo.from_pretrained(tmp_path / "out")
    changed = [
        not torch.equal(new, old)
        for new, old in zip(
            model.state_dict().values(), network().state_dict().values(), strict=True
        )
    ]
    assert any(changed)
    run(*command)
    again, _ = rtpurbo.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_calibrate_writes_a_model_with_other_thresholds(dense, texts, tmp_path):
    run(
        "adapt", dense, "-o", tmp_path / "out", "--share", 0.25, "--window", 24, "--index-dim", 4,
        "--length", 256, "--sequences", 3, "--index-steps", 2, "--rows", 16, "--distill-steps", 0,
        "--prefill", "sparse", "--top-p", 0.6, "--texts", texts,
    )  # fmt: skip
    printed = run(
        "calibrate", tmp_path / "out", "-o", tmp_path / "longer", "--length", 512, "--sequences", 1,
        "--texts", texts, "--seed", 3,
    )  # fmt: skip
    model, tokenizer = rtpurbo.from_pretrained(tmp_path / "out")
    made = rtpurbo.data.retrieval_sequences(tokenizer, [DOCUMENTS[0]], 512, 1, 3)
    metrics = rtpurbo.calibrate(model, made)
    found = state(rtpurbo.from_pretrained(tmp_path / "longer")[0]).index
    assert found.history["calibration"] == {"longest": 512, **metrics} and "tile_density" in printed
    for number, layer in state(model).index.layers.items():
        assert torch.equal(found.layers[number].threshold, layer.threshold)


def old_file(path):
    """A file in the way, and a second name for it: writing in place would show under both."""
    path.write_text("old")
    other = path.with_suffix(".old")
    other.hardlink_to(path)
    return other


def test_eval_writes_the_report(sparse, dense, texts, tmp_path):
    before = old_file(tmp_path / "report.md")
    printed = run(
        "eval", sparse, "--task", "niah", "--task", "kl", "--length", 300, "--prompts", 1,
        "--seed", 0, "--seed", 1, "--texts-per-seed", 1, "--rows", 2, "--window-divisor", 8,
        "--reference", dense, "--texts", texts, "-o", tmp_path / "report.json", "--markdown",
        tmp_path / "report.md", "--plot", tmp_path / "report.png",
    )  # fmt: skip
    report = rtpurbo.EvalReport.load(tmp_path / "report.json")
    assert [(r.task, r.mode, r.samples) for r in report.rows] == [
        (task, mode, 2) for task in ("niah", "kl") for mode in ("dense", "sparse")
    ]
    assert report.settings["window_divisor"] == 8 and report.settings["reference"] == "given"
    assert (tmp_path / "report.md").read_text() == report.to_markdown() + "\n"
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert report.to_markdown() in printed
    assert before.read_text() == "old"


def test_eval_of_one_mode_with_a_window(sparse, texts, tmp_path):
    run(
        "eval", sparse, "--task", "niah", "--length", 300, "--prompts", 1, "--window", 40,
        "--mode", "sparse", "--texts", texts, "-o", tmp_path / "r.json", "--dtype", "bfloat16",
    )  # fmt: skip
    (row,) = rtpurbo.EvalReport.load(tmp_path / "r.json").rows
    assert (row.mode, row.window) == ("sparse", 40)


def test_generate_continues_as_the_model_does(sparse, tmp_path):
    model, tokenizer = rtpurbo.from_pretrained(sparse)
    prompt = "line 4 tells of thing"
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=257)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    printed = run("generate", sparse, prompt, "--max-new-tokens", 6)
    assert printed.startswith(text) and "keys attended" in printed
    (tmp_path / "prompt.txt").write_text(prompt)
    assert (
        run("generate", sparse, "--file", tmp_path / "prompt.txt", "--max-new-tokens", 6) == printed
    )
    assert run("generate", sparse, "-", "--max-new-tokens", 6, stdin=prompt) == printed
    assert "keys attended" not in run("generate", sparse, prompt, "--dense", "--max-new-tokens", 6)


def test_select_from_is_where_heads_begin_to_select(sparse, dense):
    command = ["generate", sparse, "line 4 tells of thing " * 20, "--max-new-tokens", 3]
    assert "read every key" not in run(*command, "--select-from", 0)
    assert "retrieval heads read every key" in run(*command, "--select-from", 100_000)
    words = run("generate", dense, "line 4", "--select-from", 5, code=2)
    assert "--select-from is for a sparse model" in words


def test_prefill_takes_the_place_of_the_models(sparse, dense, monkeypatch):
    used, stats = [], rtpurbo.stats

    def spy(model):
        used.append(state(model).config.prefill)
        return stats(model)

    monkeypatch.setattr(rtpurbo, "stats", spy)
    command = ["generate", sparse, "line 4 tells of thing " * 20, "--max-new-tokens", 2]
    for options in ([], ["--prefill", "sparse"], ["--prefill", "dense"]):
        assert "for want of room" not in run(*command, *options)
    assert used == ["dense", "sparse", "dense"]
    words = run("eval", dense, "--prefill", "sparse", code=2)
    assert "--prefill is for a sparse model" in words
    words = run(*command, "--dense", "--prefill", "sparse", code=2)
    assert "--dense runs full attention" in words


def test_tiles_without_room_are_told(sparse, monkeypatch):
    monkeypatch.setattr("rtpurbo.tiles.MOST_TILE_BLOCKS", 1)
    prompt = "line 4 tells of thing " * 200
    printed = run("generate", sparse, prompt, "--prefill", "sparse", "--max-new-tokens", 2)
    assert "tiles of the prefill were dense for want of room" in printed


def test_model_reference_and_prompt_go_to_the_device(sparse, dense, texts, monkeypatch):
    named = []
    for command in ("generate", "evaluate"):
        monkeypatch.setattr(
            f"rtpurbo.commands.{command}.checked_device",
            lambda name: named.append(name) or torch.device("meta"),
        )
    for command in (
        ["generate", sparse, "line 4", "--device", "cuda"],
        ["eval", sparse, "--reference", dense, "--task", "kl", "--length", 300, "--rows", 2,
         "--texts", texts, "--device", "cuda:1"],
    ):  # fmt: skip
        seen = {}

        def stop(network, *args, seen=seen, **kwargs):
            seen |= kwargs | {"network": network}
            raise NotImplementedError("seen")

        monkeypatch.setattr("rtpurbo.evaluate", stop)
        monkeypatch.setattr("transformers.LlamaForCausalLM.generate", stop)
        CliRunner().invoke(app, [str(word) for word in command])
        parts = [seen["network"], seen.get("reference", seen["network"])]
        assert {str(next(part.parameters()).device) for part in parts} == {"meta"}
        if command[0] == "generate":
            assert str(seen["input_ids"].device) == "meta"
    assert named == ["cuda", "cuda:1"]


def test_the_cpu_is_the_default_device(sparse):
    command = ["generate", sparse, "line 4", "--max-new-tokens", 4]
    assert run(*command, "--device", "cpu") == run(*command)


def test_generate_samples_from_a_seed(sparse):
    command = ["generate", sparse, "line 4", "--max-new-tokens", 12, "--temperature", 5.0]
    first = run(*command, "--seed", 1)
    assert run(*command, "--seed", 1) == first
    assert run(*command, "--seed", 2) != first


def test_generate_wants_one_prompt(sparse, tmp_path):
    assert "either a PROMPT or --file" in run("generate", sparse, code=2)


def test_generate_applies_the_chat_template(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    rtpurbo.save_pretrained(network(sparse=True), tmp_path / "chat", tokenizer)
    options = ("--max-new-tokens", 8)
    applied = run("generate", tmp_path / "chat", "hello", "--chat", *options)
    assert applied == run("generate", tmp_path / "chat", "<hello>", *options)
    assert applied != run("generate", tmp_path / "chat", "hello", *options)


def test_info_describes_build_model_and_map(sparse, tmp_path):
    assert json.loads(run("info", "--json"))["threads"] == torch.get_num_threads()
    assert "cpu_capability" in run("info")
    about = json.loads(run("info", sparse, "--json"))
    assert about["window"] == 16 and about["index trained"] is False
    rtpurbo.HeadMap.from_roles(ROLES).save(tmp_path / "heads.json")
    assert "2 of 2x4" in run("info", tmp_path / "heads.json", "--json")
    assert "neither a head map nor a folder" in run("info", tmp_path, code=2)


def test_info_checks_the_manifest(sparse, tmp_path):
    from rtpurbo.commands.info import describe

    text = (sparse / "rtpurbo.json").read_text()
    newer = json.dumps({**json.loads(text), "version": 9})
    for content, message in ((newer, "version 9 is newer"), (text[:-40], "cut off")):
        (tmp_path / "rtpurbo.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            describe(tmp_path)


def test_bench_runs_the_checkout(monkeypatch, tmp_path):
    calls = []

    def record(command, cwd, check):
        calls.append((command[1:], cwd))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("rtpurbo.commands.bench.subprocess.run", record)
    files = ("-o", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    chosen = ("--where", "keys=9,mode=near", "--where", "keys=8", "--baselines", "cudnn")
    run("bench", "decode", "--repeats", 1, *files, *chosen)
    ((command, root),) = calls
    assert command == ["-m", "benchmarks", "decode", "--repeats", "1", "--output",
                       str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"), "--where",
                       "keys=9,mode=near", "keys=8", "--baselines", "cudnn"]  # fmt: skip
    assert (root / "benchmarks" / "__main__.py").is_file()
    monkeypatch.setattr("rtpurbo.__file__", str(tmp_path / "rtpurbo" / "__init__.py"))
    assert "source checkout" in run("bench", code=2)


def test_without_typer_the_message_names_the_extra(monkeypatch):
    from rtpurbo import cli

    for name in [name for name in sys.modules if name.startswith("rtpurbo.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"rtpurbo\[demo\]"):
        cli.main()


def refused(monkeypatch, capsys, *arguments):
    """What the program says on stderr about a command that it refuses."""
    from rtpurbo import cli

    monkeypatch.setattr(sys, "argv", ["rtpurbo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["detect", "DENSE/nosuch"], "nosuch"),
    (["detect", "nosuch", "--texts", "missing.txt"], "missing.txt"),
    (["adapt", "nosuch", "-o", "out", "--window", 0], "window must be an int >= 1, got 0"),
    (["adapt", "nosuch", "-o", "out", "--heads", "missing.json"], "missing.json"),
    (["calibrate", "DENSE", "-o", "out", "--length", 300], "sparsify"),
    (["calibrate", "nosuch", "-o", "out", "--length", 300, "--device", "gpu"], "--device must be"),
    (["eval", "nosuch", "--task", "foo"], "tasks must be among"),
    (["eval", "DENSE", "--mode", "sparse", "--length", 300, "--rows", 2], "needs a sparse model"),
    (["detect", "nosuch", "--share", 0.1, "--threshold", 0.5], "not both"),
    (["generate", "nosuch", ""], "the prompt is empty"),
    (["generate", "DENSE", "hello", "--chat"], "--chat needs a chat template"),
    (["eval", "nosuch", "--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
    (["generate", "nosuch", "x", "--device", "gpu"], "--device must be cpu, cuda or cuda:N, got"),
    (["generate", "nosuch", "x", "--device", "cuda:99"], "torch sees here, got 'cuda:99'; see"),
    (["generate", "nosuch", "x", "--device", "cuda:200"], "torch sees here, got 'cuda:200'; see"),
    (["generate", "nosuch", "x", "--device", "cuda:007"], "--device must be cpu, cuda or cuda:N"),
])  # fmt: skip
def test_what_is_refused_is_one_line(dense, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(argument).replace("DENSE", str(dense)) for argument in arguments]
    capsys.readouterr()
    said = refused(monkeypatch, capsys, *arguments).splitlines()[-1:]
    assert len(said) == 1 and said[0].startswith("rtpurbo") and message in said[0]


@pytest.mark.parametrize("arguments, message", [
    (["detect", "nosuch", "-o", "FILE/heads.json"], "FILE must be a folder"),
    (["detect", "nosuch", "-o", "FOLDER"], "FOLDER must be a file"),
    (["detect", "nosuch", "--plot", "heads.xyz"], "path must end in one of"),
    (["detect", "nosuch", "--duo-attention", "FILE"], "FILE must be a folder"),
    (["adapt", "nosuch", "-o", "FOLDER"], "FOLDER holds"),
    (["calibrate", "nosuch", "-o", "FOLDER", "--length", 300], "FOLDER holds"),
    (["adapt", "nosuch", "-o", "FILE/out"], "FILE must be a folder"),
    (["adapt", "nosuch", "-o", "out", "--work", "FILE"], "FILE must be a folder"),
    (["eval", "nosuch", "-o", "FOLDER"], "FOLDER must be a file"),
    (["eval", "nosuch", "--plot", "r.xyz"], "path must end in one of"),
    (["demo", "--model", "nosuch", "-o", "FILE"], "FILE must be a folder"),
])  # fmt: skip
def test_a_bad_output_is_known_before_the_model(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "mine.txt").write_text("mine")
    assert message in refused(monkeypatch, capsys, *arguments)


def test_folders_of_outputs_are_made(dense, texts, tmp_path):
    out = tmp_path / "new" / "heads.json"
    run("detect", dense, "-o", out, "--length", 200, "--documents", 1, "--needle-length", 8,
        "--texts", texts)  # fmt: skip
    assert out.is_file()


def test_a_negative_temperature_is_refused(monkeypatch, capsys):
    assert "--temperature" in refused(monkeypatch, capsys, "generate", "m", "x",
                                      "--temperature", -1)  # fmt: skip


def test_a_traceback_is_there_for_who_asks(monkeypatch):
    from rtpurbo import cli

    monkeypatch.setenv("RTPURBO_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["rtpurbo", "eval", "m", "--task", "foo"])
    with pytest.raises(ValueError, match="tasks must be among"):
        cli.main()
