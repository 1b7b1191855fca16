"""Claims about `model`: it is GPT-2 and Llama to rounding, its checkpoints are Hugging Face's, what
it samples it can recompute, and no row of a batch knows of its padding or its neighbours."""

import dataclasses
import json
import math
import shutil
import traceback
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kernels
from data import architectures, checkpoints
from data.architectures import layout, read_config
from model import GPT, Cache, rope_frequencies, sample

ARCHS = ["gpt2", "llama"]
SPELLINGS = ["config.json", "config_v4.json"]


@pytest.fixture(params=ARCHS)
def reference(request, shared):
    """A checkpoint that transformers wrote: (directory, arrays with its ids, logits and greedy
    tokens)."""
    directory = shared / "hf" / request.param
    return directory, np.load(directory / "expected.npz")


def relative(ours, theirs):
    """The largest error, in units of the largest value."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def all_logits(model, ids):
    return model.logits(model(torch.as_tensor(ids)[None]))[0]


def saved(model, directory):
    checkpoints.save(model, directory)
    return directory


def rewrite(directory, change):
    """Applies `change` to the dictionary in config.json."""
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


# -------------------------------------------------------------- the architectures are the real ones


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_published_checkpoints_give_their_logits_and_greedy_tokens(reference, spelling, tmp_path):
    directory, expected = reference
    shutil.copy(directory / spelling, tmp_path / "config.json")
    shutil.copy(directory / "model.safetensors", tmp_path)
    model = checkpoints.load(tmp_path)
    with torch.no_grad():
        for which in "ab":
            ids = expected[f"ids_{which}"]
            assert relative(all_logits(model, ids), expected[f"logits_{which}"]) < 1e-4
            greedy = model.generate([ids.tolist()], 20, temperature=0)
            assert greedy == [expected[f"greedy_{which}"].tolist()]


def test_in_fp64_the_logits_are_the_published_ones_to_rounding_of_the_rope_table(reference):
    directory, expected = reference
    model = checkpoints.load(directory).double()
    with torch.no_grad():
        assert relative(all_logits(model, expected["ids_b"]), expected["logits64_b"]) < 1e-6


def test_every_gradient_norm_is_the_published_one(reference):
    directory, _ = reference
    expected = json.loads((directory / "expected.json").read_text())
    arrays = np.load(directory / "expected.npz")
    model = checkpoints.load(directory).double()
    ids = torch.as_tensor(arrays["ids_b"])
    loss = kernels.linear_cross_entropy(model(ids[None, :-1])[0], model.head_weight, ids[1:])
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss_b"]), rel=1e-6)
    parameters, norms = dict(model.named_parameters()), {}
    c = model.config
    heads = [n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)]
    for name, (keys, _) in layout(model).items():
        grad = parameters[name].grad
        parts = grad.split(heads) if len(keys) == 3 else grad.chunk(len(keys))
        norms |= {key: float(part.norm()) for key, part in zip(keys, parts, strict=True)}
    published = expected["grad_norms_loss_b_fp64"]
    published = {key.split(".", 1)[1]: norm for key, norm in published.items()}
    assert norms.keys() == published.keys()
    for key, norm in published.items():
        assert norms[key] == pytest.approx(norm, rel=1e-5), key


def test_a_ragged_batch_continues_as_transformers_continues_its_left_padded_one(reference):
    directory, expected = reference
    rows = zip(expected["leftpad_ids"], expected["leftpad_mask"], strict=True)
    prompts = [ids[mask.astype(bool)].tolist() for ids, mask in rows]
    assert len(set(map(len, prompts))) > 1
    replies = checkpoints.load(directory).generate(prompts, 20, temperature=0)
    assert replies == expected["leftpad_greedy"].tolist()


def test_rope_theta_is_read_in_both_spellings(shared, tmp_path):
    outputs = []
    for spelling in SPELLINGS:
        directory = tmp_path / spelling
        directory.mkdir()
        shutil.copy(shared / "hf/llama" / spelling, directory / "config.json")
        shutil.copy(shared / "hf/llama/model.safetensors", directory)

        def set_theta(raw):
            raw.get("rope_parameters", raw)["rope_theta"] = 500.0

        rewrite(directory, set_theta)
        outputs.append(checkpoints.load(directory)(torch.arange(20)[None]).detach())
    assert torch.equal(*outputs)
    original = checkpoints.load(shared / "hf/llama")(torch.arange(20)[None]).detach()
    assert relative(outputs[0], original) > 1e-2


# -------------------------------------------------------------------------------------- checkpoints


def test_published_checkpoints_survive_a_save_and_a_load_bit_for_bit(reference, tmp_path):
    directory, expected = reference
    model = checkpoints.load(directory)
    saved(model, tmp_path)
    theirs = load_file(directory / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key
    again = checkpoints.load(tmp_path)
    assert again.config == model.config
    ids = expected["ids_a"]
    with torch.no_grad():
        assert torch.equal(all_logits(again, ids), all_logits(model, ids))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_config_that_is_written_has_the_fields_that_transformers_reads_in_both_spellings(
    shared, arch, tmp_path
):
    saved(checkpoints.load(shared / "hf" / arch), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    shape = (
        "n_ vocab_size model_type architectures layer_norm activation hidden_ intermediate num_"
        " head_dim max_position rms_ tie_ rope"
    )
    for spelling in SPELLINGS:
        theirs = json.loads((shared / "hf" / arch / spelling).read_text())
        for key, value in theirs.items():
            if key.startswith(tuple(shape.split())) and value is not None:
                assert written[key] == value, (spelling, key)
    assert written["dtype"] == written["torch_dtype"] == "float32"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_any_shape_survives_a_save_and_a_load_bit_for_bit(tiny, arch, tied, tmp_path):
    model = tiny(arch, tied=tied, eos_token_id=7, pad_token_id=3)
    again = checkpoints.load(saved(model, tmp_path))
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


def test_a_save_leaves_nothing_but_a_config_and_a_safetensors_file_of_fp32(tiny, tmp_path):
    saved(tiny().bfloat16(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("arch", ARCHS)
def test_score_checkpoints_keep_their_bias_and_gain(tiny, arch, tmp_path):
    model = tiny(arch, head="score", score_gain=2.5)
    with torch.no_grad():
        model.score_head.bias.fill_(0.3)
    again = checkpoints.load(saved(model, tmp_path))
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again.score(again(ids)), model.score(model(ids)))
    assert again.config.head == "score" and again.config.score_gain == 2.5
    assert float(again.score_head.bias.detach()) == pytest.approx(0.3)
    keys = load_file(tmp_path / "model.safetensors").keys()
    # transformers' sequence classification has no bias
    assert "score.weight" in keys and "score.bias" not in keys
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"][0].endswith("ForSequenceClassification") and raw["num_labels"] == 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_score_head_starts_on_the_trunk_of_a_language_model(tiny, arch, tied, tmp_path):
    language_model = tiny(arch, tied=tied)
    model = checkpoints.load(saved(language_model, tmp_path), head="score")
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids), language_model(ids))
    assert model.score(model(ids)).shape == (2, 12) and float(model.score_head.bias.detach()) == 0
    scale = model.score_head.weight.std() * (model.config.width + 1) ** 0.5
    assert 0.5 < float(scale.detach()) < 1.7  # 1 / sqrt(D + 1)
    assert checkpoints.load(saved(model, tmp_path / "again")).config.head == "score"


def test_a_head_that_a_checkpoint_lacks_is_a_clear_error(tiny):
    writer, judge = tiny(), tiny(head="score")
    with pytest.raises(ValueError, match="no scalar head"):
        writer.score(writer(torch.tensor([[1]])))
    with pytest.raises(ValueError, match="no vocabulary head"):
        judge.logits(judge(torch.tensor([[1]])))
    with pytest.raises(ValueError, match="no vocabulary head"):
        judge.generate([[1, 2]], 3)


@pytest.mark.parametrize(
    "kind", ["bare", "sharded", "bare and sharded", "with the tied head and old buffers"]
)
def test_names_without_prefix_and_several_files_load_alike(reference, kind, tmp_path):
    directory, _ = reference
    tensors = load_file(directory / "model.safetensors")
    if "bare" in kind:
        tensors = {key.split(".", 1)[1]: value for key, value in tensors.items()}
    if "tied" in kind:
        embedding = next(key for key in tensors if "wte" in key or "embed" in key)
        tensors["lm_head.weight"] = tensors[embedding].clone()
        if directory.name == "gpt2":  # published GPT-2 files hold the causal mask
            tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
            tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    shutil.copy(directory / "config.json", tmp_path)
    if "sharded" in kind:
        weight_map = {
            key: f"model-0000{i % 2 + 1}-of-00002.safetensors"
            for i, key in enumerate(sorted(tensors))
        }
        for file in set(weight_map.values()):
            shard = {key: tensors[key] for key in tensors if weight_map[key] == file}
            save_file(shard, tmp_path / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    ours = checkpoints.load(tmp_path).state_dict()
    theirs = checkpoints.load(directory).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_growing_the_vocabulary_keeps_every_old_row(tiny, tied, tmp_path):
    model, before = tiny(tied=tied), tiny(tied=tied)
    assert model.grow(64) is model and model.config.vocab_size == 64
    assert torch.equal(model.embed.weight[:61], before.embed.weight)
    assert torch.equal(model.head_weight[:61], before.head_weight)
    ids = torch.arange(10)
    torch.testing.assert_close(all_logits(model, ids)[:, :61], all_logits(before, ids))
    new, mean = model.embed.weight[61:].detach(), before.embed.weight.detach().mean(0)
    assert new.unique(dim=0).shape[0] == 3
    assert (new - mean).norm(dim=1).max() < 4 * before.embed.weight.norm(dim=1).mean()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert checkpoints.load(saved(model, tmp_path)).config.vocab_size == 64


def test_a_model_from_scratch_has_the_shape_that_was_asked_for():
    model = GPT.from_scratch("llama:3x64x50", vocab_size=20)
    c = model.config
    assert (c.arch, c.layers, c.width, c.context) == ("llama", 3, 64, 50)
    assert (c.vocab_size, c.heads * c.head_dim) == (20, 64)
    assert model(torch.zeros(1, 50, dtype=torch.long)).shape == (1, 50, 64)


@pytest.mark.parametrize(
    "shape",
    ["", "llama", "bert:2x64x64", "llama:0x64x64", "llama:2x0x64", "gpt2:2x33x64", "llama:2x64x1"],
)
def test_a_shape_that_cannot_be_is_refused_in_one_sentence(shape):
    with pytest.raises(ValueError, match="--shape") as caught:
        GPT.from_scratch(shape, vocab_size=20)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------- bad checkpoints


def tensors(change):
    """A fault: change(tensors) edits the dictionary of tensors in the file."""

    def damage(directory):
        values = load_file(directory / "model.safetensors")
        change(values)
        save_file(values, directory / "model.safetensors")

    return damage


def tensor(key, value):
    return tensors(lambda values: values.update({key: value}))


def weights(content):
    return lambda directory: (directory / "model.safetensors").write_bytes(content)


def index(text):
    return lambda directory: (directory / "model.safetensors.index.json").write_text(text)


def remove(name):
    return lambda directory: (directory / name).unlink()


def cut_file(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_a_pickle(directory):
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def disguised_pickle(directory):
    torch.save({"weight": torch.ones(3)}, directory / "model.safetensors")


def config_text(text):
    return lambda directory: (directory / "config.json").write_bytes(text)


def config_field(field, value):
    return lambda directory: rewrite(directory, lambda raw: raw.update({field: value}))


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)
UP = "mlp.up_proj.weight"
MISSING_SHARD = json.dumps({"weight_map": {"norm.weight": "model-1.safetensors"}})
FAULTS = {  # what is done to a good checkpoint -> (how, a word that the sentence must contain)
    "no directory": (shutil.rmtree, "config.json"),
    "no config": (remove("config.json"), "config.json"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "weights cut short": (cut_file, "model.safetensors"),
    "weights empty": (weights(b""), "model.safetensors"),
    "weights are something else": (weights(b"PK" * 500), "model.safetensors"),
    "a shard missing": (index(MISSING_SHARD), "model-1.safetensors"),
    "index not JSON": (index("{"), "index"),
    "index a list": (index("[]"), "index"),
    "a tensor missing": (
        tensors(lambda values: values.pop(f"model.layers.1.{UP}")),
        f"layers.1.{UP}",
    ),
    "a tensor too many": (
        tensor("model.layers.2.input_layernorm.weight", torch.ones(32)),
        "layers.2.input_layernorm.weight",
    ),
    "a tensor of another shape": (tensor("model.norm.weight", torch.ones(31)), "norm.weight"),
    "only a pickle": (only_a_pickle, "pytorch_model.bin is a pickle"),
    "a pickle by another name": (disguised_pickle, "not a whole safetensors file"),
    "a tensor under two names": (tensor("norm.weight", torch.ones(32)), "norm.weight twice"),
    "integers for weights": (
        tensor("model.norm.weight", torch.ones(32, dtype=torch.int8)),
        "torch.int8",
    ),
    "parts that do not fit": (tensor(f"model.layers.0.{UP}", torch.ones(48)), UP),
    "layers of another kind": (
        config_field("layer_types", ["full_attention", "sliding_attention"]),
        "layer_types",
    ),
    "a sliding window": (config_field("use_sliding_window", True), "use_sliding_window"),
    "quantised": (config_field("quantization_config", {"bits": 4}), "quantization_config"),
    "llama3 rope without its numbers": (
        config_field("rope_parameters", {"rope_type": "llama3"}),
        "rope scaling",
    ),
    "another vocabulary": (config_field("vocab_size", 99), "embed_tokens.weight"),
    "unknown architecture": (config_field("model_type", "mamba"), "mamba"),
    "unknown rope": (
        config_field("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        "rope",
    ),
    "biases": (config_field("attention_bias", True), "bias"),
    "config empty": (config_text(b""), "config.json"),
    "config not JSON": (config_text(b'{"model_type": "llama",'), "config.json"),
    "config not UTF-8": (config_text(b'{"model_type": "\xff"}'), "config.json"),
    "config a list": (config_text(b"[]"), "config.json"),
    "config without a field": (
        config_text(b'{"model_type": "llama", "vocab_size": 61}'),
        "hidden_size",
    ),
    "config with a null width": (config_field("hidden_size", None), "config.json"),
    "config with a word for a number": (config_field("num_hidden_layers", "two"), "config.json"),
    "config without heads": (config_field("num_attention_heads", 0), "config.json"),
    "rope scaling a word": (
        config_field("rope_scaling", "llama3"),
        "config.json: rope_scaling should be an object",
    ),
    "rope parameters a list": (
        config_field("rope_parameters", [1]),
        "config.json: rope_parameters should be an object",
    ),
    "rope theta a word": (config_field("rope_theta", "x"), "config.json: rope_theta should be"),
    "rope theta negative": (
        config_field("rope_parameters", {"rope_theta": -1.0}),
        "config.json: rope_theta should be",
    ),
    "llama3 rope with a word": (
        config_field("rope_parameters", LLAMA3 | {"factor": "8"}),
        "config.json: factor should be",
    ),
    "norm eps a word": (config_field("rms_norm_eps", "x"), "config.json: rms_norm_eps should be"),
    "norm eps not a number": (
        config_field("rms_norm_eps", math.nan),
        "config.json: rms_norm_eps should be",
    ),
    "init range a word": (
        config_field("initializer_range", "x"),
        "config.json: initializer_range should be",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_refused_in_one_sentence_that_names_the_file(
    tiny, fault, tmp_path, root
):
    directory = saved(tiny(), tmp_path / "checkpoint")
    damage, word = FAULTS[fault]
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        checkpoints.load(directory)
    sentence = str(caught.value)
    assert str(directory) in sentence and word in sentence
    assert "\n" not in sentence.strip() and len(sentence) < 400
    # run.script shows a library's errors as tracebacks
    raised_in = Path(traceback.extract_tb(caught.tb)[-1].filename)
    assert root in raised_in.parents, f"raised by {raised_in}"


@pytest.mark.parametrize("labels", [2, 5])
def test_a_classifier_with_several_labels_is_no_reward_model(tiny, labels, tmp_path):
    directory = saved(tiny(head="score"), tmp_path)
    tensor("score.weight", torch.ones(labels, 32))(directory)
    sentence = f"is a classifier with {labels} labels, and a reward model has one: train one with"
    with pytest.raises(ValueError, match=f"^{directory} {sentence} reward.py$"):
        checkpoints.load(directory)


@pytest.mark.parametrize("shape", [(61, 32), (60, 32)])
def test_a_tied_config_beside_another_head_is_refused(tiny, shape, tmp_path):
    directory = saved(tiny(), tmp_path)
    tensor("lm_head.weight", torch.ones(shape))(directory)
    with pytest.raises(
        ValueError, match=f"^{directory} holds a lm_head.weight that is not the emb"
    ):
        checkpoints.load(directory)
    checkpoints.load(directory, head="score")  # reads no head
    rewrite(directory, lambda raw: raw.update(tie_word_embeddings=False))
    if shape == (61, 32):
        assert torch.equal(checkpoints.load(directory).head_weight, torch.ones(shape))


def test_a_sequence_beyond_the_context_is_refused(tiny):
    with pytest.raises(ValueError, match="65 tokens.*context of 64"):
        tiny()(torch.zeros(1, 65, dtype=torch.long))


# ------------------------------------------------------------------------ nothing leaks across rows


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", ["lm", "score"])
def test_padding_batch_order_and_company_move_nothing(tiny, ragged, arch, head):
    model = tiny(arch, head=head)

    def out(ids):
        return model.score(model(ids)) if head == "score" else logprobs_of_next(model, ids)

    with torch.no_grad():
        alone = [out(torch.tensor([row])) for row in ragged]
        for pad_id, order, extra in [
            (0, [0, 1, 2, 3, 4, 5, 6, 7], 0),
            (60, [7, 2, 5, 1], 9),
            (31, [6, 6, 0, 3], 30),
        ]:
            rows = [ragged[i] for i in order]
            ids = torch.full((len(rows), max(map(len, rows)) + extra), pad_id)
            for line, row in zip(ids, rows, strict=True):
                line[: len(row)] = torch.tensor(row)
            hidden, together = model(ids), out(ids)
            for line, i in enumerate(order):
                n = len(ragged[i])
                expected = model(torch.tensor([ragged[i]]))[0]
                torch.testing.assert_close(hidden[line, :n], expected, rtol=1e-5, atol=1e-5)
                k = n - (head == "lm")  # position t's log-prob is that of token t + 1
                expected = alone[i][0, :k]
                torch.testing.assert_close(together[line, :k], expected, rtol=1e-5, atol=1e-5)


def logprobs_of_next(model, ids):
    """log p(ids[t + 1] | ids[..t]) (B, T - 1), by plain torch."""
    logits = model.logits(model(ids))[:, :-1]
    return F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_position_sees_the_future(tiny, arch):
    model, ids = tiny(arch), torch.arange(30)[None]
    changed = ids.clone()
    changed[0, 17] = 55
    with torch.no_grad():
        a, b = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(a[:17], b[:17], rtol=1e-5, atol=1e-5)
    assert all(not torch.allclose(x, y, atol=1e-3) for x, y in zip(a[17:], b[17:], strict=True))


# --------------------------------------------------------------------------------------- generation


KINDS = {
    "gpt2": dict(arch="gpt2"),
    "smollm3": dict(arch="smollm3", layers=3, no_rope=(1,)),
    "olmo2": dict(arch="olmo2"),
    "llama": dict(kv_heads=4),
    "grouped": dict(kv_heads=2),
    "one kv head, untied": dict(kv_heads=1, tied=False),
}


@pytest.fixture(params=KINDS)
def writer(request, tiny):
    return tiny(**KINDS[request.param])


def greedy_by_hand(model, prompt, n, stops=()):
    """No cache, no batch: the whole sequence anew for every token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < n and len(ids) < model.config.context:
        ids.append(int(all_logits(model, ids)[-1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def test_ragged_prompts_continue_as_they_would_alone(writer, ragged):
    alone = [greedy_by_hand(writer, prompt, 15) for prompt in ragged]
    assert writer.generate(ragged, 15, temperature=0) == alone
    assert [writer.generate([prompt], 15, temperature=0)[0] for prompt in ragged] == alone
    stops = sorted({reply[2 + i] for i, reply in enumerate(alone[:4])})  # rows end at other times
    stopped = writer.generate(ragged, 15, temperature=0, stop_id=stops)
    assert stopped == [greedy_by_hand(writer, prompt, 15, stops) for prompt in ragged]
    assert len({len(reply) for reply in stopped}) > 2


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_sampled_logprobs_are_the_recomputed_ones(writer, ragged, temperature, samples):
    options = dict(stop_id=list(range(0, 60, 8)), return_logprobs=True, samples=samples)
    generator = torch.Generator().manual_seed(1)
    replies, logprobs = writer.generate(ragged, 20, temperature, generator=generator, **options)
    assert len(set(map(len, replies))) > 2 and len(replies) == len(ragged) * samples
    prompts = [prompt for prompt in ragged for _ in range(samples)]  # a prompt's samples in a row
    for prompt, reply, sampled in zip(prompts, replies, logprobs, strict=True):
        logits = all_logits(writer, prompt + reply)[len(prompt) - 1 : -1] / temperature
        again = F.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(sampled), again, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_logprobs_are_those_at_temperature_1(tiny, ragged):
    model = tiny()
    (reply, *_), (logprobs, *_) = model.generate(ragged, 5, temperature=0, return_logprobs=True)
    logits = all_logits(model, ragged[0] + reply)[len(ragged[0]) - 1 : -1]
    again = F.log_softmax(logits, -1).max(1).values
    torch.testing.assert_close(torch.tensor(logprobs), again, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_reply_ends_with_its_first_stop_token_and_holds_no_other(tiny, ragged):
    model, stops = tiny(), [3, 17, 40]

    def generate(prompts, **options):
        return model.generate(prompts, 30, generator=torch.Generator().manual_seed(0), **options)

    replies = generate(ragged * 8, stop_id=stops)
    assert {reply[-1] for reply in replies} >= set(stops)  # each of them stops
    for reply in replies:
        assert not set(reply[:-1]) & set(stops) and (reply[-1] in stops or len(reply) == 30)
    one = generate(ragged * 8, stop_id=17)
    assert any(reply[-1] == 17 and len(reply) < 30 for reply in one)
    assert all(17 not in reply[:-1] for reply in one)
    assert all(len(reply) == 30 for reply in generate(ragged))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_reply_stops_at_the_context_and_fills_it(tiny, arch):
    model = tiny(arch)
    prompts = [[1] * 63, [2] * 60, [3], [4] * 50]
    replies, logprobs = model.generate(prompts, 10, temperature=0, return_logprobs=True)
    assert list(map(len, replies)) == list(map(len, logprobs)) == [1, 4, 10, 10]
    assert replies == [greedy_by_hand(model, prompt, 10) for prompt in prompts]
    assert list(map(len, model.generate(prompts, 1000))) == [1, 4, 63, 14]


@pytest.mark.parametrize("prompts", [[[1], []], [[1] * 64], [[1] * 70]])
def test_a_prompt_that_leaves_no_room_is_refused_by_number(tiny, prompts):
    sentence = f"prompt {len(prompts) - 1} has {len(prompts[-1])} tokens"
    with pytest.raises(ValueError, match=sentence):
        tiny().generate(prompts, 5)


def test_no_prompts_and_no_tokens_are_empty_answers(tiny):
    assert tiny().generate([], 5) == [] and tiny().generate([[1], [2]], 0) == [[], []]
    assert tiny().generate([[1]], 0, return_logprobs=True) == ([[]], [[]])


def test_generation_does_not_change_the_prompts_or_keep_gradients(tiny):
    model, prompts = tiny(), [[1, 2], [3]]
    model.generate(prompts, 3)
    assert prompts == [[1, 2], [3]]
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_what_is_streamed_is_what_is_returned(writer, ragged):
    heard = [[] for _ in range(2 * len(ragged))]

    def stream(rows, tokens):
        for row, token in zip(rows, tokens, strict=True):
            heard[row].append(token)

    def generate(**options):
        options |= dict(stop_id=list(range(0, 60, 8)), samples=2)
        return writer.generate(ragged, 20, generator=torch.Generator().manual_seed(1), **options)

    replies = generate(stream=stream)
    assert heard == replies == generate()


@pytest.fixture
def fixed_shapes(monkeypatch):
    """A GPU's loop over steps and its way to draw, on the CPU, without recording."""
    monkeypatch.setattr("model.uses_graphs", lambda device: True)
    monkeypatch.setattr("kernels.sampling.uses_graphs", lambda device: True)


@torch.no_grad()
def test_steps_of_one_shape_give_the_same_greedy_replies(writer, ragged, fixed_shapes):
    alone = [greedy_by_hand(writer, prompt, 20) for prompt in ragged]
    stops = sorted({reply[2 + i] for i, reply in enumerate(alone[:4])})
    for options in (dict(), dict(stop_id=stops), dict(stop_id=alone[0][3])):
        ends = options.get("stop_id", ())
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        replies, logprobs = writer.generate(
            ragged, 20, temperature=0, return_logprobs=True, **options
        )
        assert replies == [greedy_by_hand(writer, prompt, 20, ends) for prompt in ragged]
        assert list(map(len, logprobs)) == list(map(len, replies))
    prompts = [[1] * 63, [2] * 60, [3], [4] * 50]  # the context ends three of them
    replies = writer.generate(prompts, 10, temperature=0)
    assert replies == [greedy_by_hand(writer, prompt, 10) for prompt in prompts]


@torch.no_grad()
def test_steps_of_one_shape_sample_with_the_logprobs_of_training(writer, ragged, fixed_shapes):
    options = dict(stop_id=list(range(0, 60, 8)), return_logprobs=True, samples=3)
    generator = torch.Generator().manual_seed(1)
    replies, logprobs = writer.generate(ragged, 20, 0.7, generator=generator, **options)
    assert len(set(map(len, replies))) > 2 and len(replies) == 3 * len(ragged)
    prompts = [prompt for prompt in ragged for _ in range(3)]
    for prompt, reply, sampled in zip(prompts, replies, logprobs, strict=True):
        assert not set(reply[:-1]) & set(options["stop_id"])
        logits = all_logits(writer, prompt + reply)[len(prompt) - 1 : -1] / 0.7
        again = F.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(sampled), again, rtol=1e-5, atol=1e-5)


def test_steps_of_one_shape_end_soon_after_the_last_reply(tiny, ragged, fixed_shapes, monkeypatch):
    model, drawn = tiny(), []
    monkeypatch.setattr("model.sample", lambda logits, *_: drawn.append(0) or logits.argmax(-1))
    replies = model.generate(ragged, 50, stop_id=list(range(61)))
    assert all(len(reply) == 1 for reply in replies) and len(drawn) == 16


@torch.no_grad()
def test_top_k_1_and_a_tiny_top_p_are_greedy(tiny, ragged):
    model = tiny()
    greedy = model.generate(ragged, 12, temperature=0)
    assert model.generate(ragged, 12, top_k=1) == greedy
    assert model.generate(ragged, 12, top_p=1e-6) == model.generate(ragged, 12, top_p=0.0) == greedy
    assert model.generate(ragged, 12, top_k=0, top_p=1.0) != greedy


@torch.no_grad()
def test_the_generator_decides_what_is_sampled(tiny, ragged):
    model = tiny()
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    first, again, other = (model.generate(ragged, 12, generator=seed) for seed in seeds)
    assert first == again != other


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [0.4, 0.3, 0.2, 0.1]),
        (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),  # p^(1/T), normalised
        (dict(temperature=2.0), [0.3254, 0.2818, 0.2301, 0.1627]),
        (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (dict(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (dict(top_p=0.69), [4 / 7, 3 / 7, 0, 0]),  # the smallest set that holds .69 is .4 + .3
        (dict(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (dict(top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0]),  # after top-k the first two hold .78
    ],
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_tokens_are_drawn_with_the_probabilities_that_were_asked_for(
    options, expected, on_gpu, monkeypatch
):
    monkeypatch.setattr("kernels.sampling.uses_graphs", lambda device: on_gpu)
    n = 40000
    order = [2, 0, 3, 1]  # shuffled, so that a sorted order cannot pass for the vocabulary's
    probabilities = torch.zeros(4)
    probabilities[order] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    tokens = sample(probabilities.log().expand(n, 4), generator=generator, **options)
    shares = torch.bincount(tokens, minlength=4)[order] / n
    wanted = torch.tensor(expected)
    assert torch.all((shares - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / n).sqrt() + 1e-4)
    assert torch.all(shares[wanted == 0] == 0)


def test_the_cache_and_rope_keep_the_precision_of_autocast(tiny, ragged, monkeypatch):
    model, dtypes = tiny(kv_heads=2), set()
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        dtypes.update(x.dtype for x in (q, k, v))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    select = Cache.select
    monkeypatch.setattr(
        Cache, "select", lambda self, rows: dtypes.add(self.keys.dtype) or select(self, rows)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(ragged, 5, samples=2)
    assert dtypes == {torch.bfloat16}


def test_a_score_is_fp32_under_autocast(tiny):
    """In bf16 a score would have three digits, and a difference of scores none."""
    model = tiny(head="score")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.score(model(torch.tensor([[1, 2, 3]]))).dtype == torch.float32


# ---------------------------------------------------------- every architecture, as its peers see it


FAMILY = {  # name -> how transformers calls it, and what is not Llama's default shape
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", {}),
    "llama, untied": ("Llama", dict(tie_word_embeddings=False)),
    "llama 3.1": ("Llama", dict(llama3=True)),
    "qwen2": ("Qwen2", {}),
    "qwen2, untied": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "mistral, a window as long as its context": ("Mistral", dict(sliding_window=64)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=5)),
    "smollm3, two layers without rope": (
        "SmolLM3",
        dict(no_rope_layers=[0, 1, 0], num_hidden_layers=3),
    ),
    "olmo2": ("Olmo2", dict(num_key_value_heads=4)),
    "olmo2, grouped, untied": ("Olmo2", dict(tie_word_embeddings=False)),
}


@pytest.fixture(params=FAMILY)
def peer(request):
    """make(score): a random model of transformers, in fp32, in which every parameter matters."""
    transformers = pytest.importorskip("transformers")
    name, changes = FAMILY[request.param]

    def make(score=False):
        shape = dict(vocab_size=61, pad_token_id=0, initializer_range=0.3)
        if name == "GPT2":
            shape |= dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
        else:
            shape |= dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
            shape |= dict(num_attention_heads=4, num_key_value_heads=2)
            shape |= dict(max_position_embeddings=64, tie_word_embeddings=True)
        shape |= {key: value for key, value in changes.items() if key != "llama3"}
        if "llama3" in changes:
            shape["rope_parameters"] = {"rope_theta": 100.0, **LLAMA3}
        torch.manual_seed(3)
        ending = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        if score:
            ending = "ForSequenceClassification"
            shape["num_labels"] = 1
        config = getattr(transformers, f"{name}Config")(**shape)
        model = getattr(transformers, f"{name}{ending}")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


def slow_logits(raw, tensors, ids):
    """The logits (T, V) of a file's tensors, token by token and head by head, from the papers: no
    stacked matrices, no batch, rotations as complex numbers. raw: config.json."""
    arch, eps = raw["model_type"], raw["rms_norm_eps"]
    heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
    d = raw.get("head_dim") or raw["hidden_size"] // heads
    rates = raw["rope_theta"] ** (-torch.arange(d // 2).double() / (d // 2))  # (d/2,)
    tensors = {name.removeprefix("model."): x.double() for name, x in tensors.items()}

    def norm(x, name):
        return tensors[f"{name}.weight"] * x / (x.pow(2).mean() + eps).sqrt()

    def linear(x, name):
        return tensors[f"{name}.weight"] @ x + tensors.get(f"{name}.bias", 0)

    def normed(x, name):  # of queries or keys
        if arch == "qwen3":
            return torch.cat([norm(part, name) for part in x.split(d)])
        return norm(x, name) if arch == "olmo2" else x

    def turned(x, position):
        pairs = torch.complex(*x.view(-1, 2, d // 2).unbind(1))  # (n, d/2)
        pairs = pairs * torch.polar(torch.ones_like(rates), rates * position)
        return torch.cat([pairs.real, pairs.imag], 1)  # (n, d)

    stream = [tensors["embed_tokens.weight"][id] for id in ids]
    for layer in range(raw["num_hidden_layers"]):
        at = f"layers.{layer}."
        before, between, after = "input_layernorm", "post_attention_layernorm", ""
        if arch == "olmo2":
            before, between, after = "", "", "post_feedforward_layernorm"
        rope = arch != "smollm3" or raw["no_rope_layers"][layer]
        keys, values, results = [], [], []
        for position, x in enumerate(stream):
            y = norm(x, at + before) if before else x
            q = normed(linear(y, at + "self_attn.q_proj"), at + "self_attn.q_norm")
            k = normed(linear(y, at + "self_attn.k_proj"), at + "self_attn.k_norm")
            q, keys_here = turned(q, position * rope), turned(k, position * rope)
            keys.append(keys_here)
            values.append(linear(y, at + "self_attn.v_proj").view(groups, d))
            seen = []
            for head in range(heads):
                group = head * groups // heads
                past = torch.stack([key[group] for key in keys])  # (position + 1, d)
                weights = (past @ q[head] / d**0.5).softmax(0)
                seen.append(weights @ torch.stack([value[group] for value in values]))
            y = linear(torch.cat(seen), at + "self_attn.o_proj")
            x = x + (norm(y, at + "post_attention_layernorm") if arch == "olmo2" else y)
            y = norm(x, at + between) if between else x
            gate, up = linear(y, at + "mlp.gate_proj"), linear(y, at + "mlp.up_proj")
            y = linear(gate * torch.sigmoid(gate) * up, at + "mlp.down_proj")
            results.append(x + (norm(y, at + after) if after else y))
        stream = results
    head = "embed_tokens" if raw["tie_word_embeddings"] else "lm_head"
    return torch.stack([linear(norm(x, "norm"), head) for x in stream])


SLOW = {
    "llama": dict(arch="llama"),
    "mistral": dict(arch="mistral", head_dim=16),
    "qwen2": dict(arch="qwen2"),
    "qwen3": dict(arch="qwen3", head_dim=16),
    "smollm3": dict(arch="smollm3", layers=5, no_rope=(3,)),
    "smollm3, other layers": dict(arch="smollm3", layers=3, no_rope=(0, 2), tied=False),
    "olmo2": dict(arch="olmo2", kv_heads=4),
    "olmo2, grouped": dict(arch="olmo2", tied=False),
}


@pytest.mark.parametrize("kind", SLOW)
@torch.no_grad()
def test_every_architecture_is_what_its_file_means_token_by_token(tiny, kind, tmp_path):
    model = tiny(**SLOW[kind])
    raw = json.loads((saved(model, tmp_path) / "config.json").read_text())
    ids = torch.randint(61, (12,), generator=torch.Generator().manual_seed(1))
    expected = slow_logits(raw, load_file(tmp_path / "model.safetensors"), ids.tolist())
    again = checkpoints.load(tmp_path)
    assert again.config == model.config
    assert relative(all_logits(again, ids).double(), expected) < 1e-5
    assert relative(all_logits(again.double(), ids), expected) < 1e-6


def test_smollm3_leaves_rope_out_of_every_fourth_layer_unless_its_config_lists_others(
    tiny, tmp_path
):
    directory = saved(tiny("smollm3", layers=8, no_rope=(0,)), tmp_path)
    assert checkpoints.load(directory).config.no_rope == (0,)
    rewrite(directory, lambda raw: raw.update(no_rope_layers=None))
    assert checkpoints.load(directory).config.no_rope == (3, 7)
    rewrite(directory, lambda raw: raw.update(no_rope_layer_interval=3))
    assert checkpoints.load(directory).config.no_rope == (2, 5)


@pytest.mark.parametrize(
    "field, value",
    [
        ("no_rope_layers", [1]),
        ("no_rope_layers", "1110"),
        ("no_rope_layers", [1, 2]),
        ("no_rope_layer_interval", 0),
    ],
)
def test_layers_without_rope_of_a_wrong_form_are_refused(tiny, field, value, tmp_path):
    directory = saved(tiny("smollm3"), tmp_path)
    rewrite(directory, lambda raw: raw.update({field: value}))
    with pytest.raises(ValueError, match=f"config.json: {field} should be"):
        checkpoints.load(directory)


def test_a_field_that_is_absent_means_what_transformers_takes_it_for(tiny, tmp_path):
    absent = "num_key_value_heads tie_word_embeddings rms_norm_eps rope_theta rope_parameters"
    expected = {
        "llama": (4, False, 1e-6, 1e4),
        "mistral": (8, False, 1e-6, 1e4),
        "smollm3": (4, True, 1e-6, 2e6),
        "olmo2": (4, False, 1e-5, 1e4),
    }
    for arch, values in expected.items():
        directory = saved(tiny(arch), tmp_path / arch)
        rewrite(directory, lambda raw: [raw.pop(name) for name in absent.split()])
        c = read_config(directory)
        assert (c.kv_heads, c.tied, c.norm_eps, c.rope_theta) == values, arch


@pytest.mark.parametrize("window", ["absent", None, 64, 63, "wide"])
def test_mistral_s_sliding_window_is_refused_where_it_is_shorter_than_the_context(
    tiny, window, tmp_path
):
    directory = saved(tiny("mistral"), tmp_path)
    if window == "absent":  # then transformers takes 4096
        rewrite(directory, lambda raw: raw.pop("sliding_window"))
        rewrite(directory, lambda raw: raw.update(max_position_embeddings=4097))
    else:
        rewrite(directory, lambda raw: raw.update(sliding_window=window))
    if window in (None, 64):
        assert checkpoints.load(directory).config.context == 64
        return
    with pytest.raises(ValueError, match="config.json: attention to the last .* is not supported"):
        checkpoints.load(directory)
    if window == "absent":
        rewrite(directory, lambda raw: raw.update(max_position_embeddings=4096))
        assert checkpoints.load(directory).config.context == 4096


@torch.no_grad()
def test_transformers_models_give_their_logits_and_greedy_tokens(peer, tmp_path):
    theirs = peer()
    theirs.save_pretrained(tmp_path)
    ours = checkpoints.load(tmp_path)
    ids = torch.randint(1, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    assert relative(ours.logits(ours(ids)), theirs(ids).logits) < 1e-5
    options = dict(do_sample=False, eos_token_id=None, attention_mask=torch.ones(3, 20))
    greedy = theirs.generate(ids[:, :20], max_new_tokens=20, **options)
    assert ours.generate(ids[:, :20].tolist(), 20, temperature=0) == greedy[:, 20:].tolist()


@torch.no_grad()
def test_what_we_save_opens_in_transformers_with_the_same_logits(peer, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer().save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs")
    directory = saved(ours, tmp_path / "ours")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, keys = load(directory, output_loading_info=True)
    assert not any(keys[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(1, 60)[None]
    assert relative(ours.logits(ours(ids)), theirs(ids).logits) < 1e-5
    assert checkpoints.load(tmp_path / "ours").config == ours.config


@torch.no_grad()
def test_reward_models_of_either_side_score_alike_up_to_the_constant_bias(peer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = peer(score=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs")
    ids = torch.randint(1, 61, (4, 20), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([20, 7, 13, 1])
    ids[torch.arange(20) >= lengths[:, None]] = 0  # right-padded; 0 is the padding token
    rows, mask = (torch.arange(4), lengths - 1), (ids > 0).long()
    expected = theirs(ids, attention_mask=mask).logits[:, 0]
    assert relative(ours.score(ours(ids))[rows], expected) < 1e-5
    ours.score_head.bias.fill_(0.7)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    again = load(saved(ours, tmp_path / "ours")).eval()
    scores = ours.score(ours(ids))[rows] - 0.7
    assert relative(again(ids, attention_mask=mask).logits[:, 0], scores) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_open_as_fp32_master_weights(tiny, dtype, tmp_path):
    saved(tiny("qwen3", head_dim=16), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    halves = {key: value.to(dtype) for key, value in whole.items()}
    save_file(halves, tmp_path / "model.safetensors")
    model = checkpoints.load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed.weight, halves["model.embed_tokens.weight"].float())


def test_llama_3s_rope_leaves_fast_pairs_and_slows_down_slow_ones(tiny):
    plain = rope_frequencies(tiny(rope_theta=500000.0, head_dim=128).config)
    scaling = (8.0, 1.0, 4.0, 8192)
    model = tiny(rope_theta=500000.0, head_dim=128, rope_scaling=scaling)
    scaled = rope_frequencies(model.config)
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    assert torch.all((scaled <= plain) & (scaled >= plain / 8.0001))
    assert 0 < ((turns > 1) & (turns < 4)).sum() < 20


def test_a_checkpoint_is_read_without_a_second_copy(tiny, tmp_path, monkeypatch):
    """No two tensors of the file are alive at once, but for those that are stacked into one of
    ours."""
    saved(tiny(layers=4), tmp_path)
    alive, most, read = [], [], architectures.Stored.__call__

    def watched(stored):
        tensor = read(stored)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(tensor)]
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(architectures.Stored, "__call__", watched)
    checkpoints.load(tmp_path)
    assert max(most) <= 4 and len(most) == 4 * 9 + 2


# ---------------------------------------------------------------------------- more rows than ids


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def padded_model(request, tiny):
    """61 rows, and a vocabulary of 50: the 11 others are the likeliest everywhere."""
    model = tiny(tied=request.param)
    model.config.n_ids = 50
    with torch.no_grad():
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        weight = model.embed.weight if request.param else model.lm_head.weight
        weight[50:] = 3 * direction  # of either sign it would be sampled
        weight[55:] = -3 * direction
    return model


def cut_to(model, ids):
    """The same model without the rows that no id uses."""
    smaller = GPT(dataclasses.replace(model.config, vocab_size=ids, n_ids=None))
    state = model.state_dict()
    heads = ("embed.weight", "lm_head.weight")
    smaller.load_state_dict({k: v[:ids] if k in heads else v for k, v in state.items()})
    return smaller


def test_rows_without_an_id_are_never_sampled_and_in_no_normaliser(padded_model, ragged):
    model = padded_model
    smaller = cut_to(model, 50)
    prompts = [[id % 50 for id in prompt] for prompt in ragged]
    for options in (dict(temperature=0), dict(top_k=9), dict(top_p=0.9), dict(temperature=3.0)):
        runs = []
        for each in (model, smaller):
            generator = torch.Generator().manual_seed(2)
            options |= dict(generator=generator, return_logprobs=True, samples=5)
            runs.append(each.generate(prompts, 12, **options))
        assert runs[0] == runs[1]
        assert max(map(max, runs[0][0])) < 50
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.logits(model(ids)), smaller.logits(smaller(ids)))
    hidden, targets = model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    out = kernels.linear_logprob(hidden, model.head_weight, targets, entropy=True)
    expected = smaller.logits(hidden).log_softmax(-1)
    torch.testing.assert_close(out.logprob, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(out.entropy, -(expected.exp() * expected).sum(1))


def test_rows_without_an_id_get_no_gradient_and_the_others_the_right_one(padded_model):
    model = padded_model
    smaller = cut_to(model, 50)
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(3))
    for each in (model, smaller):
        hidden = each(ids)[:, :-1].flatten(0, 1)
        kernels.linear_cross_entropy(hidden, each.head_weight, ids[:, 1:].flatten()).backward()
    grads = {name: parameter.grad for name, parameter in smaller.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad[: len(grads[name])], grads[name]), name
        assert not parameter.grad[len(grads[name]) :].any(), name


def test_a_head_without_spare_rows_is_the_parameter_itself(tiny):
    for tied in (True, False):
        model = tiny(tied=tied)
        head = model.embed if tied else model.lm_head
        assert model.head_weight is head.weight


def test_a_checkpoint_keeps_its_spare_rows_and_growing_uses_them_up(padded_model, tmp_path):
    model = padded_model
    again = checkpoints.load(saved(model, tmp_path))
    assert again.config.vocab_size == 61 and torch.equal(again.embed.weight, model.embed.weight)
    assert len(model.grow(64).head_weight) == 64
