"""evaluate: right scores, honest budgets, and a model that is left as it was."""

import io
import json

import pytest
import torch
from rich.console import Console

import rtpurbo
from rtpurbo.data import needle_prompts
from rtpurbo.evaluate import EvalReport, EvalRow, evaluate
from rtpurbo.patching import state
from tests.front import DOCUMENTS, network
from tests.tokenizers import byte_tokenizer

SMALL = {"prompts": 2, "documents": DOCUMENTS, "texts_per_seed": 1, "rows": 4}


@pytest.fixture(scope="module")
def report():
    return evaluate(
        network(sparse=True),
        byte_tokenizer(),
        ["niah", "mk2", "kl", "nll", "prefill_kl", "prefill_nll"],
        [512],
        seeds=(0, 1),
        window_divisor=8,
        **SMALL,
    )


def test_one_row_for_each_task_length_and_mode(report):
    tasks = ["niah", "mk2", "kl", "nll", "prefill_kl", "prefill_nll"]
    assert [(r.task, r.mode) for r in report.rows] == [
        (task, mode) for task in tasks for mode in ("dense", "sparse")
    ]
    assert report.scores["niah"][512].keys() == {"dense", "sparse"}
    assert all(len(row.by_seed) == 2 for row in report.rows)
    assert report.row("niah", 512, "dense").samples == 4


def test_dense_attends_all_and_sparse_no_more_than_window_floor_and_share(report):
    dense, sparse = (report.row("niah", 512, mode) for mode in ("dense", "sparse"))
    answer = len(needle_prompts(byte_tokenizer(), DOCUMENTS, 512)[0].answer)
    assert dense.attended_tokens == 512 - answer + (answer - 1) / 2
    assert dense.attended_fraction == 1
    assert dense.kv_bytes == dense.dense_bytes == 2 * 2 * 2 * 8 * 4 * 511
    assert sparse.window == 64
    assert 64 < sparse.attended_tokens < dense.attended_tokens
    assert sparse.attended_fraction == pytest.approx(sparse.attended_tokens / 508, rel=0.02)
    assert sparse.kv_bytes < sparse.dense_bytes == dense.dense_bytes
    assert sparse.index_bytes > 0 and dense.index_bytes == 0


def test_kl_is_zero_for_dense_and_positive_for_sparse(report):
    for prefix in ("", "prefill_"):
        assert report.row(f"{prefix}kl", 512, "dense").score == pytest.approx(0, abs=1e-5)
        assert report.row(f"{prefix}kl", 512, "sparse").score > 1e-4


def test_nll_is_that_of_one_dense_forward():
    model, tokenizer = network(), byte_tokenizer()
    text = rtpurbo.data.excerpts(tokenizer, DOCUMENTS, 200, 1, 0)[0]
    found = evaluate(model, tokenizer, ["nll", "prefill_nll"], [200], **SMALL)
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0].log_softmax(-1)
    for task, rows in (("nll", 4), ("prefill_nll", 100)):
        last = range(200 - rows, 200)
        expected = -sum(logits[row - 1, text[row]].item() for row in last) / rows
        assert found.row(task, 200, "dense").score == pytest.approx(expected, abs=1e-4)


@pytest.mark.families
def test_decode_of_a_window_that_holds_everything_equals_dense():
    model = network(sparse=True, window=4096)
    found = evaluate(model, byte_tokenizer(), ["kl", "niah"], [300], **SMALL)
    assert found.row("kl", 300, "sparse").score == pytest.approx(0, abs=1e-5)
    assert found.row("niah", 300, "sparse").attended_fraction == 1


def test_a_model_that_continues_with_the_answer_scores_one():
    """A lookup table in place of the network: what `evaluate` feeds it decides its answers."""
    model, tokenizer = network(), byte_tokenizer()
    prompts = needle_prompts(tokenizer, DOCUMENTS, 300, 2, needles=1, seed=0)
    following = {}
    for prompt in prompts:
        whole = prompt.tokens + prompt.answer
        for end in range(len(prompt.tokens), len(whole)):
            following[tuple(whole[:end])] = whole[end]
    seen: list[int] = []

    def oracle(module, args, kwargs, output):
        seen.extend(kwargs["input_ids"][0].tolist())
        answer = following.get(tuple(seen), 0)
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(answer), 258) * 100.0

    def remember(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            seen[:] = kwargs["input_ids"][0].tolist()

    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    handle = model.register_forward_hook(oracle, with_kwargs=True)
    assert evaluate(model, tokenizer, ["niah"], [300], **SMALL).rows[0].score == 1
    handle.remove()
    assert evaluate(model, tokenizer, ["niah"], [300], **SMALL).rows[0].score == 0


def test_another_reference_is_what_kl_is_measured_against():
    model, reference = network(sparse=True), network()
    with torch.no_grad():
        reference.lm_head.weight *= 5
    own = evaluate(model, byte_tokenizer(), ["kl"], [200], modes=["dense"], **SMALL)
    other = evaluate(
        model, byte_tokenizer(), ["kl"], [200], modes=["dense"], reference=reference, **SMALL
    )
    assert own.rows[0].score == pytest.approx(0, abs=1e-5)
    assert other.rows[0].score > 0.01


def test_the_model_is_left_as_it_was():
    model = network(sparse=True).train()
    config = state(model).config
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, byte_tokenizer(), ["niah"], [300], window=32, **SMALL)
    assert state(model).config is config and model.training and state(model).active
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_error_on_the_way_leaves_the_model_as_it_was():
    model = network(sparse=True)
    config = state(model).config
    with pytest.raises(ValueError, match="length"):
        evaluate(model, byte_tokenizer(), ["mk8"], [64], window=8, **SMALL)
    assert state(model).config is config and state(model).active


def test_lengths_beyond_the_context_warn():
    model = network()
    model.config.max_position_embeddings = 128
    with pytest.warns(UserWarning, match="is 200 tokens, beyond this model's context of 128"):
        evaluate(model, byte_tokenizer(), ["prefill_nll"], [200], **SMALL)


def test_progress_counts_every_sample():
    ticks = []
    evaluate(
        network(sparse=True),
        byte_tokenizer(),
        ["niah", "kl"],
        [300],
        progress=lambda *tick: ticks.append(tick),
        **{**SMALL, "rows": 2},
    )
    assert [done for _, done, _ in ticks] == list(range(1, 7))
    assert {total for *_, total in ticks} == {6}


def test_the_report_survives_json(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert EvalReport.load(tmp_path / "report.json") == report
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["settings"]["window_divisor"] == 8
    assert data["settings"]["environment"]["packages"]["torch"]
    data["version"] = 2
    with pytest.raises(ValueError, match="newer"):
        EvalReport.from_dict(data)


def test_the_table_has_every_row(report):
    lines = report.to_markdown().splitlines()
    assert len(lines) == 2 + len(report.rows)
    assert len({line.count("|") for line in lines}) == 1
    assert len(report.table().rows) == len(report.rows)
    assert str(report) == report.to_markdown()


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_the_terminal_with_every_cell_whole(width):
    row = EvalRow("prefill_nll", 131072, "sparse", 12.3456, 20, [0.5], 16384, 12345.0, 0.094,
                  10**9, 10**8, 10**10, 1234.0)  # fmt: skip
    share = EvalRow(
        "mk8", 131072, "dense", 0.95, 20, [0.95], None, 131072.0, 1.0, 10**10, 0, 10**10
    )
    report = EvalReport([row, share])
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.table(console.width))
    printed = console.export_text()
    assert all(len(line) <= width for line in printed.splitlines())
    for cell in ("prefill_nll", "131,072", "16,384", "12.3456", "0.76–0.99", "0.094", "0.110"):
        assert cell in printed
    assert ("1,234" in printed or "1234" in printed) == (width > 80)


def test_wilson_interval():
    row = EvalRow("niah", 1, "dense", 0.9, 10, [0.9])
    assert row.interval == pytest.approx((0.596, 0.982), abs=1e-3)
    assert EvalRow("niah", 1, "dense", 1.0, 20, [1.0]).interval[1] == pytest.approx(1)
    assert EvalRow("nll", 1, "dense", 2.0, 20, [2.0]).interval is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["mk0"]}, "tasks must be among"),
        ({"tasks": "niah"}, "tasks must be among"),
        ({"tasks": []}, "tasks must be among"),
        ({"lengths": []}, "lengths and seeds"),
        ({"lengths": 300}, r"lengths must be a list of ints, got 300; write \[300\]"),
        ({"lengths": ["300"]}, "lengths must be a list of ints"),
        ({"seeds": 0}, r"seeds must be a list of ints, got 0; write \[0\]"),
        ({"documents": "one text"}, "documents must be a non-empty list of strings, got one"),
        ({"documents": [""]}, "texts must hold at least one token"),
        ({"modes": "dense"}, "modes must be among .*, got 'dense'"),
        ({"prompts": 0}, "prompts"),
        ({"tasks": ["kl"], "lengths": [100]}, "rows"),
        ({"modes": ["sparse"]}, "sparsify first"),
        ({"modes": ["fast"]}, "modes must be among"),
        ({"window": 8, "window_divisor": 8}, "not both"),
        ({"window_divisor": 4096}, "window_divisor"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    options = {"tasks": ["niah"], "lengths": [512], **arguments}
    with pytest.raises(ValueError, match=message):
        evaluate(network(), byte_tokenizer(), **options)
