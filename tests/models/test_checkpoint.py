"""save_pretrained and from_pretrained: what is kept, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import rtpurbo
from rtpurbo.checkpoint import check_destination
from rtpurbo.files import sha256_of
from rtpurbo.patching import state
from tests.models.tiny import FAMILIES, config, in_pieces, tiny, tokens, whole
from tests.tokenizers import byte_tokenizer

pytestmark = pytest.mark.families


@pytest.fixture
def saved(tmp_path):
    model = rtpurbo.sparsify(tiny(), config(window=8, top_p=0.7))
    rtpurbo.save_pretrained(model, tmp_path / "out", byte_tokenizer())
    return tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refine", [False, True])
def test_round_trip(family, refine, tmp_path):
    settings = config(
        window=8, top_p=0.7, index="full", share_index_keys=True, index_bits=4, refine=refine
    )
    model, ids = rtpurbo.sparsify(tiny(family), settings), tokens(60)
    index = state(model).index
    for layer in index.layers.values():
        for tensor in layer.tensors().values():
            tensor += torch.randn_like(tensor)
    index.trained, index.history = True, {"kl": [1.0, 0.5]}
    rtpurbo.save_pretrained(model, tmp_path / "a" / "out", byte_tokenizer())
    loaded, tokenizer = rtpurbo.from_pretrained(tmp_path / "a" / "out")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    assert state(loaded).config == settings
    assert (state(loaded).index.trained, state(loaded).index.history) == (True, index.history)
    pieces = [40, *[1] * 20]
    torch.testing.assert_close(in_pieces(loaded, ids, pieces), in_pieces(model, ids, pieces))


def test_the_folder_is_an_ordinary_dense_model(saved):
    plain = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(whole(plain, tokens()), whole(tiny(), tokens()))


def test_options_reach_transformers(saved):
    model, _ = rtpurbo.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_saving_again_replaces_and_other_folders_are_safe(saved, tmp_path):
    model, tokenizer = rtpurbo.from_pretrained(saved)
    rtpurbo.save_pretrained(model, saved, tokenizer)
    rtpurbo.from_pretrained(saved)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    for path in (tmp_path / "precious", tmp_path / "precious" / "thesis.txt"):
        with pytest.raises(FileExistsError, match="choose a new path"):
            rtpurbo.save_pretrained(model, path, tokenizer)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["notes.txt", "runs/log.txt", "empty/"])
def test_a_folder_with_files_of_the_user_is_not_replaced(saved, name):
    model, tokenizer = rtpurbo.from_pretrained(saved)
    mine = saved / name
    mine.parent.mkdir(exist_ok=True)
    mine.mkdir() if name.endswith("/") else mine.write_text("mine")
    for check in (check_destination, lambda path: rtpurbo.save_pretrained(model, path, tokenizer)):
        with pytest.raises(FileExistsError, match=name.partition("/")[0]):
            check(saved)
    assert mine.exists()


def test_destinations_that_are_free(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (saved, tmp_path / "empty", tmp_path / "new"):
        check_destination(path)
    (saved / "rtpurbo.json").write_text("{")
    with pytest.raises(FileExistsError, match=r"would be deleted with it \(config\.json"):
        check_destination(saved)


def test_files_that_come_while_saving_are_kept(saved, monkeypatch):
    model, tokenizer = rtpurbo.from_pretrained(saved)
    save = rtpurbo.checkpoint.save_file

    def meanwhile(*arguments):
        (saved / "notes.txt").write_text("mine")
        save(*arguments)

    monkeypatch.setattr("rtpurbo.checkpoint.save_file", meanwhile)
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        rtpurbo.save_pretrained(model, saved, tokenizer)
    assert (saved / "notes.txt").read_text() == "mine"


def test_an_interrupted_save_leaves_the_old_folder(saved, tmp_path, monkeypatch):
    model, tokenizer = rtpurbo.from_pretrained(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr("rtpurbo.checkpoint.save_file", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rtpurbo.save_pretrained(model, saved, tokenizer)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_a_tokenizer(tmp_path):
    model = rtpurbo.sparsify(tiny(), config())
    rtpurbo.save_pretrained(model, tmp_path / "out")
    assert rtpurbo.from_pretrained(tmp_path / "out")[1] is None


def test_a_tokenizer_with_several_chat_templates(tmp_path):
    model, tokenizer = rtpurbo.sparsify(tiny(), config()), byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for _ in range(2):
        rtpurbo.save_pretrained(model, tmp_path / "out", tokenizer)
    _, loaded = rtpurbo.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == tokenizer.chat_template
    more = tmp_path / "out" / "additional_chat_templates" / "more.jinja"
    more.write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"more\.jinja.* does not list"):
        rtpurbo.from_pretrained(tmp_path / "out")


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not sparse"):
        rtpurbo.save_pretrained(tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["rtpurbo_index.safetensors", "model.safetensors", "config.json", "rtpurbo.json"]
)
def test_files_that_are_cut_off_or_gone(saved, name):
    file = saved / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut off"):
        rtpurbo.from_pretrained(saved)
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"missing|holds no"):
        rtpurbo.from_pretrained(saved)


@pytest.mark.parametrize("name", ["rtpurbo_index.safetensors", "model.safetensors"])
def test_files_that_were_changed(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[-3] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match="was changed after it was saved"):
        rtpurbo.from_pretrained(saved)


def test_files_that_are_not_listed_are_refused(saved):
    import peft

    base = AutoModelForCausalLM.from_pretrained(saved)
    lora = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(saved)
    with pytest.raises(ValueError, match=r"holds \['adapter_config\.json', 'adapter_model"):
        rtpurbo.from_pretrained(saved)
    for file in saved.glob("adapter*"):
        file.unlink()
    for name in ("README.md", ".gitattributes"):
        (saved / name).write_text("harmless")
    rtpurbo.from_pretrained(saved)


def test_pickled_weights_are_refused(saved):
    weights = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    manifest = json.loads((saved / "rtpurbo.json").read_text())
    files = manifest["files"]
    files["pytorch_model.bin"] = {
        "bytes": (saved / "pytorch_model.bin").stat().st_size,
        "sha256": sha256_of(saved / "pytorch_model.bin"),
    }
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        rtpurbo.from_pretrained(saved)
    del files["model.safetensors"]
    edit(saved, manifest)
    with pytest.raises(ValueError, match=r"must list .* weights, model\*\.safetensors"):
        rtpurbo.from_pretrained(saved)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        rtpurbo.from_pretrained(saved, use_safetensors=False)


def edit(saved, manifest, **changes):
    (saved / "rtpurbo.json").write_text(json.dumps({**manifest, **changes}))


def test_manifests_that_are_newer_foreign_or_odd(saved):
    manifest = json.loads((saved / "rtpurbo.json").read_text())
    edit(saved, manifest, extra=1)
    with pytest.warns(UserWarning, match=r"unknown keys \['extra'\]"):
        rtpurbo.from_pretrained(saved)
    other = rtpurbo.families.identity(tiny(seed=2))
    file = manifest["files"]["config.json"]
    cases = [
        ({"version": 3}, "version 3 is newer"),
        ({"version": 0}, "version must be 1 to 2, got 0"),
        ({"version": None}, "version must be a JSON whole number, got None"),
        ({"base_model": {}}, "base_model: identity must be a JSON string, got None"),
        ({"config": 3}, "config must be a JSON object, got 3"),
        ({"index": {}}, "index: trained must be a JSON boolean, got None"),
        ({"index": {"trained": True, "history": []}}, "history must be a JSON object"),
        ({"files": []}, r"files must be a JSON object, got \[\]"),
        ({"files": {"model.safetensors": 3}}, r"files: model\.safetensors must be a JSON object"),
        ({"files": {"config.json": {"bytes": 1}}}, r"config\.json: sha256 must be a JSON string"),
        ({"format": "x"}, "not a"),
        ({"base_model": {"identity": other}}, "holds an index for llama"),
        ({"files": {**manifest["files"], "../out/config.json": file}}, "files must lie in"),
        ({"files": {**manifest["files"], str(saved / "config.json"): file}}, "files must lie in"),
        ({"files": {}}, r"must list rtpurbo_index\.safetensors"),
    ]

    for change, message in cases:
        edit(saved, manifest, **change)
        with pytest.raises(ValueError, match=message):
            rtpurbo.from_pretrained(saved)


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("trained", [True, False])
def test_thresholds_of_version_1(tmp_path, prefill, trained):
    """They were calibrated for exp-sums: refused where a sparse prefill would use them."""
    model = rtpurbo.sparsify(tiny(), config(window=8, prefill=prefill))
    state(model).index.trained = trained
    rtpurbo.save_pretrained(model, tmp_path, byte_tokenizer())
    rtpurbo.from_pretrained(tmp_path)
    edit(tmp_path, json.loads((tmp_path / "rtpurbo.json").read_text()), version=1)
    if trained and prefill == "sparse":
        with pytest.raises(ValueError, match=r"version 1, whose thresholds .*train_index again"):
            rtpurbo.from_pretrained(tmp_path)
    else:
        rtpurbo.from_pretrained(tmp_path)


def test_a_configuration_that_was_changed(saved):
    manifest = json.loads((saved / "rtpurbo.json").read_text())
    heads = manifest["config"]["heads"]
    moved = {**heads, "roles": [row[::-1] for row in heads["roles"]]}
    for change in ({"window": 9}, {"heads": moved}):
        edit(saved, manifest, config={**manifest["config"], **change})
        with pytest.raises(ValueError, match=r"config or its heads .* were changed"):
            rtpurbo.from_pretrained(saved)
    edit(saved, manifest)
    rtpurbo.from_pretrained(saved)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no rtpurbo\.json"):
        rtpurbo.from_pretrained(tmp_path)
