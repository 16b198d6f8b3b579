"""HeadMap and RTPurboConfig: validation and file formats."""

import json

import pytest
import torch

from rtpurbo import HeadMap, RTPurboConfig

SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.5, 0.5, 0.0, 0.7]])


@pytest.fixture
def heads():
    return HeadMap.from_scores(
        SCORES, 0.5, stability={"documents": {"overlap": 0.8}}, model_id="m", kv_heads=2
    )


def test_all_layers_are_ranked_together(heads):
    assert heads.roles.tolist() == [[False, True, False, False], [True, True, False, True]]
    assert heads.threshold == 0.5
    assert heads.retrieval_heads(1) == [0, 1, 3]
    assert repr(heads) == "HeadMap(4 of 2x4 heads retrieve)"


def test_ties_go_to_the_earlier_head():
    heads = HeadMap.from_scores(torch.full((2, 3), 0.5), 1 / 3)
    assert heads.roles.tolist() == [[True, True, False], [False, False, False]]


@pytest.mark.parametrize("share, count", [(0, 0), (1, 8), (0.15, 1)])
def test_share(share, count):
    heads = HeadMap.from_scores(SCORES, share)
    assert int(heads.roles.sum()) == count
    assert count or heads.threshold == float("inf")


@pytest.mark.parametrize("threshold, count", [(0, 8), (0.5, 4), (0.51, 2), (1, 0)])
def test_threshold(threshold, count):
    heads = HeadMap.from_scores(SCORES, threshold=threshold)
    assert torch.equal(heads.roles, threshold <= SCORES)
    assert int(heads.roles.sum()) == count and heads.share == count / 8


def test_share_or_threshold():
    assert HeadMap.from_scores(SCORES) == HeadMap.from_scores(SCORES, 0.15)
    with pytest.raises(ValueError, match="share or threshold, not both"):
        HeadMap.from_scores(SCORES, 0.15, threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        HeadMap.from_scores(SCORES, threshold=2)
    with pytest.raises(ValueError, match="share must be"):
        HeadMap.from_scores(SCORES, share=-0.1)


def test_json_round_trip(heads, tmp_path):
    path = tmp_path / "heads.json"
    heads.save(path)
    assert HeadMap.load(path) == heads
    assert [file.name for file in tmp_path.iterdir()] == ["heads.json"]


def test_json_unknown_newer_foreign_cut_and_incomplete(heads, tmp_path):
    path = tmp_path / "heads.json"
    data = heads.to_dict()
    with pytest.warns(UserWarning, match=r"unknown keys \['colour'\]"):
        assert HeadMap.from_dict({**data, "colour": 1}) == heads
    with pytest.raises(ValueError, match="version 2 is newer than 1"):
        HeadMap.from_dict({**data, "version": 2})
    with pytest.raises(ValueError, match="not a"):
        HeadMap.from_dict({**data, "format": "else"})
    with pytest.raises(ValueError, match=r"\['scores'\] are missing"):
        HeadMap.from_dict({k: v for k, v in data.items() if k != "scores"})
    path.write_text(json.dumps(data)[:-40])
    with pytest.raises(ValueError, match="cut off"):
        HeadMap.load(path)


@pytest.mark.parametrize("change, message", [
    ({"version": None}, "version must be a JSON whole number, got None"),
    ({"version": True}, "version must be a JSON whole number, got True"),
    ({"version": -3}, "version must be 1 to 1, got -3"),
    ({"scores": [[0.5], [0.5, 0.5]]}, "scores must be one row of numbers a layer"),
    ({"roles": [[1, 0], [1]]}, "roles must be one row of numbers a layer"),
    ({"roles": [["a"]]}, "roles must be one row of numbers a layer"),
    ({"share": "x"}, "share must be a number, got 'x'"),
])  # fmt: skip
def test_odd_json(heads, change, message):
    with pytest.raises(ValueError, match=rf"rtpurbo\.HeadMap: {message}"):
        HeadMap.from_dict({**heads.to_dict(), **change})


@pytest.mark.parametrize("change", [
    {"roles": torch.zeros(2, 3, dtype=torch.bool)}, {"roles": torch.zeros(2, 4)},
    {"scores": torch.full((2, 4), float("nan"))}, {"scores": torch.zeros(4)}, {"kv_heads": 3},
])  # fmt: skip
def test_refused_maps(change):
    good = {"scores": SCORES, "roles": SCORES > 0.4, "share": 0.5}
    with pytest.raises(ValueError, match=r"rtpurbo\.HeadMap"):
        HeadMap(**{**good, **change})


def test_headwise_config_of_rtp_llm(heads):
    written = heads.to_headwise_config(swa_token_num=1024)
    assert written == {
        "sink_token_num": 4,
        "swa_token_num": 1024,
        "seqlen_threshold": 16384,
        "0": [0, 1, 0, 0],
        "1": [1, 1, 0, 1],
    }
    assert torch.equal(HeadMap.from_headwise_config(written).roles, heads.roles)
    inside = {"model_type": "qwen3", "headwise_config": {"1": [0, 0, 1, 0]}}
    read = HeadMap.from_headwise_config(inside, layers=3)
    assert read.roles.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]]
    with pytest.raises(ValueError, match="holds no layer"):
        HeadMap.from_headwise_config({"sink_token_num": 4})
    with pytest.raises(ValueError, match="equally long rows"):
        HeadMap.from_headwise_config({"0": [1], "1": [1, 0]})
    with pytest.raises(TypeError, match="unknown headwise settings"):
        heads.to_headwise_config(window=3)


@pytest.mark.parametrize("row", [[2, -1], [0.5, 1], 1, "10"])
def test_headwise_rows_are_zeros_and_ones(row):
    with pytest.raises(ValueError, match=r"headwise_config\['0'\] must be a list of 0 and 1"):
        HeadMap.from_headwise_config({"0": row})


@pytest.mark.parametrize("roles", [torch.rand(2, 6), torch.ones(2, 4), [[2, 0]], [[-1, 1]]])
def test_roles_are_not_guessed_from_numbers(roles):
    with pytest.raises(ValueError, match="roles must be bool, or ints that are 0 or 1"):
        HeadMap.from_roles(roles)


def test_duo_attention(heads, tmp_path):
    heads.to_duo_attention(tmp_path, sink_size=8, recent_size=64)
    text = (tmp_path / "full_attention_heads.tsv").read_text()
    assert text == "1.000000\t0.000000\n1.000000\t1.000000\n"
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "sink_size": 8,
        "recent_size": 64,
    }
    read = HeadMap.from_duo_attention(tmp_path, group=2)
    assert read.roles.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    (tmp_path / "full_attention_heads.tsv").write_text("0.4\t1.7\n")
    assert HeadMap.from_duo_attention(tmp_path).roles.tolist() == [[False, True]]
    assert HeadMap.from_duo_attention(tmp_path, threshold=0.3).roles.all()
    with pytest.raises(ValueError, match="pass kv_heads="):
        HeadMap.from_roles([[1, 0]]).to_duo_attention(tmp_path)


@pytest.mark.parametrize("change", [
    {"window": 0}, {"window": 1.5}, {"sinks": -1}, {"index_dim": 0}, {"index": "both"},
    {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": float("nan")}, {"min_tokens": -1}, {"recent": 0},
    {"block_size": 8}, {"block_size": True}, {"prefill": "lazy"}, {"share_index_keys": 1},
    {"index_bits": 2}, {"select_from": -1}, {"select_from": True},
    {"refine": True}, {"refine": 1}, {"block_size": 16, "refine": True, "index_bits": 4},
])  # fmt: skip
def test_refused_configurations(heads, change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"rtpurbo\.RTPurboConfig: {name} must be"):
        RTPurboConfig(heads=heads, **change)
    with pytest.raises(AttributeError):
        setattr(RTPurboConfig(heads=heads), name, 1)


def test_refine_says_what_it_needs(heads):
    with pytest.raises(ValueError, match="refine must be False with index_bits=16, got True; choo"):
        RTPurboConfig(heads=heads, refine=True)
    with pytest.raises(ValueError, match=r"block_size must be 1 with refine=True.*got 32"):
        RTPurboConfig(heads=heads, refine=True, index_bits=8, block_size=32)
    for bits in (4, 8):
        config = RTPurboConfig(heads=heads, refine=True, index_bits=bits)
        assert RTPurboConfig.from_dict(config.to_dict()) == config
        assert not RTPurboConfig(heads=heads, index_bits=bits).refine


def test_configuration_needs_a_head_map():
    with pytest.raises(TypeError, match="heads must be a HeadMap, got list"):
        RTPurboConfig(heads=[[1]])


def test_configuration_round_trip(heads):
    config = RTPurboConfig(
        heads=heads, window=64, index="full", block_size=16, top_p=1, select_from=9
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert RTPurboConfig.from_dict(data) == config
    with pytest.warns(UserWarning, match="unknown keys"):
        RTPurboConfig.from_dict({**data, "colour": 1})
    with pytest.raises(ValueError, match="newer"):
        RTPurboConfig.from_dict({**data, "version": 9})
    with pytest.raises(ValueError, match="'heads' is missing"):
        RTPurboConfig.from_dict({k: v for k, v in data.items() if k != "heads"})
