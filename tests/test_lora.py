"""LoRA: an adapter changes nothing at first, is nothing but a product of low rank, travels in the
PEFT layout, and lets four models share one trunk."""

import copy
import itertools
import json
import shutil
import time

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

import dpo
import kernels
import ppo
import reward
import run
import sft
from data import chat, checkpoints, tokenizer, world
from data.adapters import load_adapter, save_adapter
from model import GPT

ARCHS = {"gpt2": {}, "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": dict(head_dim=16)}
ARCHS |= {"smollm3": dict(no_rope=(1,)), "olmo2": {}}
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def opened(tiny, tmp_path):
    """opened(arch, head): a tiny checkpoint as `checkpoints.load` gives it."""

    def open_(arch="llama", head="lm", name="base", **changes):
        checkpoints.save(tiny(arch, head=head, **(ARCHS[arch] | changes)), tmp_path / name)
        return checkpoints.load(tmp_path / name)

    return open_


def close_to_peft(theirs, model, ids):
    """The logits of a PEFT model are ours, or its scores but for our bias, which PEFT lacks."""
    if model.config.head == "score":
        ours = model.score(model(ids))[:, -1:] - model.score_head.bias
    else:
        ours = model.logits(model(ids))
    close(theirs(ids, attention_mask=torch.ones_like(ids)).logits, ours)


def trained(model, seed=1):
    """As if it had learnt something: no A and no B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_reward_model(directory, vocab_size=None):
    """directory/reward: trained with LoRA from directory/base."""
    model = checkpoints.load(directory / "base", head="score")
    if vocab_size:
        model.grow(vocab_size)
    checkpoints.save(trained(model.adapt(4)), directory / "reward")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def bytes_of(*models):
    """Bytes of all distinct tensors of the models."""
    return sum({p.data_ptr(): p.nbytes for model in models for p in model.parameters()}.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_a_new_adapter_changes_nothing_and_only_it_learns(opened, arch):
    model = opened(arch)
    before = model(IDS).detach()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert model.adapt(3) is model and model.rank == 3
    assert torch.equal(model(IDS), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [
        f"{i}.{m}" for i in range(2) for m in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    ]
    assert learning == {f"blocks.{matrix}.{x}" for matrix in matrices for x in "AB"}
    optimizer = run.adamw(model, 0.1)
    for step in range(2):
        model.logits(model(IDS)).square().mean().backward()
        run.clip(model, max_norm=1.0)
        run.step(optimizer, run.linear(0.1, step, 2))
    assert not torch.allclose(model(IDS), before)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_merged_and_unmerged_logits_agree(opened, arch, tmp_path):
    model = trained(opened(arch).adapt(3, alpha=5.0))
    apart = model.logits(model(IDS))
    checkpoints.save(model, tmp_path / "saved")
    merged = checkpoints.load(tmp_path / "saved")
    beside = load_adapter(opened(arch, name="again"), tmp_path / "saved/adapter")
    for other in (merged, beside, checkpoints.load(tmp_path / "saved/adapter"), model.merge()):
        assert (other.logits(other(IDS)) - apart).abs().max() < 1e-5 * apart.abs().max()
    assert merged.rank == model.rank == 0 and beside.rank == 3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_adapter_s_own_matrices_are_added_with_alpha_over_rank(opened):
    model = opened()
    attn = model.blocks[0].attn.qkv
    before = attn.weight.clone()
    trained(model.adapt(2, alpha=6.0, targets="qkv"))
    height = 32  # q is 4 x 8, k and v are 2 x 8 each: three adapters of rank 2
    assert attn.A.shape == (3 * 2, 32) and attn.B.shape == (64, 2)
    delta = attn.merged() - before
    torch.testing.assert_close(delta[:height], 3.0 * attn.B[:height] @ attn.A[:2])
    k = slice(height, height + 16)
    torch.testing.assert_close(delta[k], 3.0 * attn.B[k] @ attn.A[2:4])
    assert torch.linalg.matrix_rank(delta[:height]) == 2 and model.blocks[0].mlp.up.A is None


@pytest.mark.parametrize("targets", ["attn", "qkv,", "q_proj", ""])
def test_unknown_targets_are_refused_in_one_sentence(opened, targets):
    with pytest.raises(ValueError, match="--lora-targets.*qkv,out,up,down"):
        opened().adapt(2, targets=targets)


def test_random_weights_are_nothing_to_adapt(tiny):
    with pytest.raises(ValueError, match="--lora-rank.*--init"):
        tiny().adapt(2)


# --------------------------------------------------------------------------- one trunk, four models


def test_reference_critic_and_reward_model_share_the_trunk(opened, tmp_path):
    """As in PPO: a reward model trained with LoRA from the same base adds its adapter only."""
    trunk = bytes_of(opened())
    save_reward_model(tmp_path)
    policy = checkpoints.load(tmp_path / "base").adapt(2)
    alone = checkpoints.load(tmp_path / "reward")
    reward_model = checkpoints.load(tmp_path / "reward", trunk=policy)
    close(reward_model.score(reward_model(IDS)), alone.score(alone(IDS)))
    critic, ref, before = reward_model.share(), policy.reference(), policy(IDS).detach()
    adapters = bytes_of(policy, reward_model) - trunk
    assert bytes_of(policy, ref) < trunk + adapters
    assert bytes_of(policy, ref, critic, reward_model) < trunk + 2 * adapters
    trained(policy)
    assert torch.equal(ref(IDS), before) and not torch.allclose(policy(IDS), before)
    scores = reward_model.score(reward_model(IDS)).detach()
    critic_before = critic.score(critic(IDS)).detach()
    assert torch.equal(critic_before, scores)
    own = set(critic.parameters()) - set(reward_model.parameters())
    for parameter in critic.parameters():
        assert parameter.requires_grad == (parameter in own)
    trained(critic)
    assert torch.equal(reward_model.score(reward_model(IDS)), scores)
    assert torch.equal(ref(IDS), before)
    assert not torch.allclose(critic.score(critic(IDS)), scores)


def test_a_reward_model_of_another_trunk_is_opened_whole(opened, tmp_path):
    opened()
    save_reward_model(tmp_path)
    checkpoints.save(trained(opened(name="other")), tmp_path / "other")
    policy = checkpoints.load(tmp_path / "other").adapt(2)
    reward_model = checkpoints.load(tmp_path / "reward", trunk=policy)
    alone = checkpoints.load(tmp_path / "reward")
    assert reward_model.rank == 0
    assert torch.equal(reward_model.score(reward_model(IDS)), alone.score(alone(IDS)))


def test_a_critic_beside_a_reward_model_of_its_own_trunk_costs_an_adapter_and_a_head(opened):
    reward_model = opened(head="score")
    critic = reward_model.requires_grad_(False).share().adapt(2)
    own = sum(p.nbytes for p in critic.parameters() if p.requires_grad)
    assert bytes_of(reward_model, critic) - bytes_of(reward_model) == own
    scores = reward_model.score(reward_model(IDS))
    trained(critic)
    assert torch.equal(reward_model.score(reward_model(IDS)), scores)
    assert not torch.allclose(critic.score(critic(IDS)), scores)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_grown_vocabulary_go_with_the_adapter(opened, tied, tmp_path):
    model = trained(opened(tied=tied).grow(64).adapt(2))
    checkpoints.save(model, tmp_path / "saved")
    again = checkpoints.load(tmp_path / "saved/adapter")
    close(again.logits(again(IDS + 40)), model.logits(model(IDS + 40)))
    small = trained(checkpoints.load(tmp_path / "base").adapt(2))
    checkpoints.save(small, tmp_path / "small")
    keys = load_file(tmp_path / "small/adapter/adapter_model.safetensors")
    assert not any("embed" in key for key in keys)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_rows_of_new_tokens_train_beside_an_adapter(opened, tied):
    model = opened(tied=tied).adapt(2, new_ids=[7, 60])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before, ids = model.logits(model(IDS)).detach(), torch.tensor([[7, 5, 60, 7, 8]])
    others = model.embed.merged().detach().clone()
    optimizer = run.adamw(model, 0.1)
    hidden = model(ids[:, :-1]).flatten(0, 1)
    kernels.linear_cross_entropy(hidden, model.head_weight, ids[0, 1:]).backward()
    run.step(optimizer, 0.1)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    for table in model.tables():
        assert torch.equal(table.rows, table.merged()[[7, 60]])
        assert not torch.isclose(table.rows, table.weight[[7, 60]]).any()
    others[[7, 60]] = model.embed.rows.detach()
    assert torch.equal(model.embed(ids), others[ids])
    merged = copy.deepcopy(model).merge()
    close(merged.logits(merged(IDS)), model.logits(model(IDS)))
    assert merged.rank == 0 and not torch.equal(model.logits(model(IDS)), before)
    assert torch.equal(model.reference().head_weight, model.tables()[-1].weight)


@pytest.mark.parametrize("tied", [True, False])
def test_sampling_reads_the_rows_that_train(opened, tied, ragged):
    model = trained(opened(tied=tied).adapt(2, new_ids=list(range(0, 61, 3))))
    merged = copy.deepcopy(model).merge()
    assert model.generate(ragged, 12, 0) == merged.generate(ragged, 12, 0)
    ref = model.reference()
    assert ref.generate(ragged, 12, 0) != merged.generate(ragged, 12, 0)


# Base models, as (spare rows, whether the vocabulary has the chat tokens):
BASES = {"with the chat tokens": (0, True), "without": (0, False), "without, padded": (64, False)}


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_the_first_adapter_on_a_base_model_trains_the_rows_of_the_chat_tokens(
    base, place, world_encoding
):
    """They are untrained even where the base model has them. A model that was taught to chat has
    learnt them, unless it is given another template."""
    spare, has_tokens = BASES[base]
    special = world_encoding._special_tokens
    if not has_tokens:
        special = {token: id for token, id in special.items() if "im_" not in token}
    pattern, ranks = world_encoding._pat_str, world_encoding._mergeable_ranks
    options = dict(pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    encoding = tiktoken.Encoding("base", **options)
    torch.manual_seed(0)
    model = GPT.from_scratch("llama:1x32x128", encoding.n_vocab + spare)
    checkpoints.save(model, "base", encoding, chat=False)
    flags = dict(lora_rank=2, steps=2, batch_size=8, device="cpu", out="sft")
    policy, extended = checkpoints.open_policy(sft.Config(init="base", **flags), "cpu")
    start, end = (extended._special_tokens[f"<|im_{side}|>"] for side in ("start", "end"))
    assert policy.embed.index.tolist() == sorted([start, end])
    with torch.enable_grad():
        sft.main(sft.Config(init="base", lr=1e-2, **flags))
    name = "model.embed_tokens.weight"
    before, after = (load_file(f"{d}/model.safetensors")[name] for d in ("base", "sft"))
    if base != "without":
        assert (after != before).any(1).nonzero()[:, 0].tolist() == sorted([start, end])
    for config in (sft.Config(init="sft", **flags), dpo.Config(init="sft", lora_rank=2)):
        assert checkpoints.open_policy(config, "cpu")[0].embed.rows is None
    llama3 = sft.Config(init="sft", template="llama3", **flags)
    encoding = checkpoints.open_vocabulary(llama3, template="llama3")
    tokens = chat.TEMPLATES["llama3"].tokens
    policy = checkpoints.open_model(llama3, encoding, "cpu")
    assert policy.embed.index.tolist() == sorted(encoding._special_tokens[t] for t in tokens)
    if not has_tokens:
        return
    # Qwen2.5's base models have a chat template, too, but end elsewhere
    shutil.copy("sft/chat_template.jinja", "base")
    path = place / "base/config.json"
    for token, rows in (("<|im_end|>", []), ("<|endoftext|>", sorted([start, end]))):
        facts = json.loads(path.read_text()) | {"eos_token_id": extended._special_tokens[token]}
        path.write_text(json.dumps(facts))
        policy, _ = checkpoints.open_policy(sft.Config(init="base", **flags), "cpu")
        assert (policy.embed.index.tolist() if policy.embed.rows is not None else []) == rows


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("kind", ["lm", "untied", "score"])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@torch.no_grad()
def test_peft_opens_the_rows_of_new_tokens_and_we_open_its(opened, arch, kind, grown, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    head = "score" if kind == "score" else "lm"
    model = opened(arch, head, tied=kind != "untied", pad_token_id=0)
    trained((model.grow(63) if grown else model).adapt(3, new_ids=[7, 60]))
    checkpoints.save(model, tmp_path / "saved")
    auto = "SequenceClassification" if head == "score" else "CausalLM"
    base = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "base")
    if grown:
        base.resize_token_embeddings(63)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "saved/adapter").eval()
    ids = IDS + (39 if grown else 37)  # all new tokens among them
    ids[0, 0] = 7
    close_to_peft(theirs, model, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(
        opened(arch, head, name="again", tied=kind != "untied"), tmp_path / "theirs"
    )
    close(again(ids), model(ids))
    if head == "lm":
        close(again.logits(again(ids)), model.logits(model(ids)))


def test_a_reward_model_s_own_rows_of_new_tokens_do_not_touch_the_shared_trunk(opened, tmp_path):
    opened()
    reward_model = checkpoints.load(tmp_path / "base", head="score").adapt(4, new_ids=[5])
    checkpoints.save(trained(reward_model), tmp_path / "reward")
    policy = trained(checkpoints.load(tmp_path / "base").adapt(2, new_ids=[5, 6]))
    logits, table = policy.logits(policy(IDS)).detach(), policy.embed.weight.clone()
    shared = checkpoints.load(tmp_path / "reward", trunk=policy)
    assert shared.embed.weight is policy.embed.weight and shared.rank == 4
    close(shared.score(shared(IDS)), reward_model.score(reward_model(IDS)))
    trained(shared.share().adapt(4))
    assert torch.equal(policy.embed.weight, table)
    assert torch.equal(policy.logits(policy(IDS)), logits)


def test_a_reward_model_of_another_shape_is_opened_whole(opened, tmp_path):
    opened(layers=3)
    save_reward_model(tmp_path)
    policy = opened(name="other").adapt(2)
    assert checkpoints.load(tmp_path / "reward", trunk=policy).config.layers == 3


def test_a_shared_reward_model_never_writes_into_the_policy(opened, tmp_path):
    """An adapter with grown rows carries the whole embedding; where the policy's is another,
    nothing is shared and nothing overwritten."""
    checkpoints.save(trained(opened().grow(64).adapt(2)), tmp_path / "grown")
    save_reward_model(tmp_path, vocab_size=64)
    policy = checkpoints.load(tmp_path / "grown").adapt(2)
    before = policy.embed.weight.clone()
    reward_model = checkpoints.load(tmp_path / "reward", trunk=policy)
    assert torch.equal(policy.embed.weight, before)
    alone = checkpoints.load(tmp_path / "reward")
    close(reward_model.score(reward_model(IDS)), alone.score(alone(IDS)))


def test_without_adapters_copies_share_no_weight(opened):
    model = opened()
    for other in (model.share(), model.reference()):
        assert bytes_of(model, other) == 2 * bytes_of(model)
        assert torch.equal(other(IDS), model(IDS))


# ---------------------------------------------------------------------------------- the PEFT layout


def test_the_adapter_s_files_name_what_peft_names(opened, tmp_path):
    checkpoints.save(trained(opened().adapt(2, targets="qkv,down")), tmp_path / "saved")
    facts = json.loads((tmp_path / "saved/adapter/adapter_config.json").read_text())
    assert facts["peft_type"] == "LORA" and (facts["r"], facts["lora_alpha"]) == (2, 4.0)
    attention = ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert facts["target_modules"] == ["mlp.down_proj", *attention]
    tensors = load_file(tmp_path / "saved/adapter/adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.k_proj"
    assert tensors[f"{stem}.lora_A.weight"].shape == (2, 32)
    assert tensors[f"{stem}.lora_B.weight"].shape == (16, 2)
    assert len(tensors) == 2 * 4 * 2


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_peft_opens_our_adapters_and_we_open_its(opened, arch, head, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = trained(opened(arch, head, pad_token_id=0).adapt(3, alpha=5.0))
    checkpoints.save(model, tmp_path / "saved")
    kind = "SequenceClassification" if head == "score" else "CausalLM"
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "saved/adapter").eval()
    ids = IDS + 1
    close_to_peft(theirs, model, ids)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(opened(arch, head, name="again"), tmp_path / "theirs")
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_an_adapter_with_a_score_head_opens_as_a_reward_model(opened, arch, tmp_path):
    opened(arch)
    model = trained(checkpoints.load(tmp_path / "base", head="score").adapt(2))
    model.config.score_gain = 1.5
    checkpoints.save(model, tmp_path / "reward")
    again = checkpoints.load(tmp_path / "reward/adapter")
    whole = checkpoints.load(tmp_path / "reward")
    assert again.config.head == "score" and again.config.score_gain == 1.5
    assert model.score_head.bias != 0
    for other in (again, whole):
        close(other.score(other(IDS)), model.score(model(IDS)))
    with pytest.raises(ValueError, match="no place.*score"):
        checkpoints.load(tmp_path / "reward/adapter", head="lm")
    model.score_head.weight = torch.nn.Parameter(torch.zeros(2, 32))
    save_adapter(model, tmp_path / "two")
    with pytest.raises(ValueError, match="a head of shape .2, 32., a score needs .1, 32."):
        checkpoints.load(tmp_path / "two")


@torch.no_grad()
def test_an_adapter_of_an_adapted_model_names_it_as_its_base(opened, tmp_path):
    save_adapter(trained(opened().adapt(2)), tmp_path / "first")
    model = trained(checkpoints.load(tmp_path / "first").grow(67).adapt(3), seed=2)
    save_adapter(model, tmp_path / "second")
    again = checkpoints.load(tmp_path / "second")
    close(again.logits(again(IDS)), model.logits(model(IDS)))
    facts = json.loads((tmp_path / "second/adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(tmp_path / "first")
    # the base of a third one holds the new rows: they need not go with it
    save_adapter(trained(again.adapt(2), seed=3), tmp_path / "third")
    keys = load_file(tmp_path / "third/adapter_model.safetensors")
    assert not any("embed" in key for key in keys)


def test_an_adapter_of_queries_and_values_alone_leaves_the_keys(opened, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    opened()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(checkpoints.load(tmp_path / "base"), tmp_path / "theirs")
    close(ours.logits(ours(IDS)), theirs(IDS).logits)


def edit(field, value):
    def damage(directory):
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return damage


def remove(name):
    return lambda directory: (directory / name).unlink()


def drop_one(name):
    def damage(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        del tensors[next(key for key in tensors if name in key)]
        save_file(tensors, path)

    return damage


FAULTS = {
    "half an adapter": (drop_one("lora_B"), "lora_B.weight, and an adapter needs both"),
    "the other half": (drop_one("lora_A"), "lora_B.weight, and an adapter needs both"),
    "no rank": (edit("r", 0), "no plain LoRA adapter .LORA, r 0"),
    "alpha as text": (edit("lora_alpha", "16"), "no plain LoRA adapter .*alpha 16"),
    "DoRA": (edit("use_dora", True), "use_dora"),
    "another method": (edit("peft_type", "IA3"), "IA3"),
    "another rank": (edit("r", 5), "rank r 5"),
    "no weights": (remove("adapter_model.safetensors"), "adapter_model.safetensors"),
    "no config": (remove("adapter_config.json"), "adapter_config.json"),
    "PiSSA changes the base": (edit("init_lora_weights", "pissa"), "pissa"),
    "layers repeated": (edit("layer_replication", [[0, 2], [1, 2]]), "layer_replication"),
    "rows of other ids": (edit("trainable_token_indices", {"embed_tokens": [7]}), "ids .7."),
    "rows of no ids": (edit("trainable_token_indices", None), "ids .."),
    "rows of words": (edit("trainable_token_indices", ["a", "b"]), "not those of the ids"),
    "rows far beyond the vocabulary": (edit("trainable_token_indices", [7, 1 << 30]), "ids .7"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_adapter_is_refused_in_one_sentence(opened, fault, tmp_path):
    model = opened().adapt(2, new_ids=[7, 60])
    checkpoints.save(model, tmp_path / "saved")
    damage, word = FAULTS[fault]
    damage(tmp_path / "saved/adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=word) as caught:
        load_adapter(checkpoints.load(tmp_path / "base"), tmp_path / "saved/adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_with_an_embedding_of_another_width_is_refused(opened, tmp_path):
    checkpoints.save(trained(opened().adapt(2)), tmp_path / "saved")
    path = tmp_path / "saved/adapter/adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.weight"
    for shape in ((61, 31), (60, 32)):
        save_file(load_file(path) | {key: torch.zeros(shape)}, path)
        with pytest.raises(ValueError, match="embed.weight of shape .6., 3.., this model needs"):
            load_adapter(checkpoints.load(tmp_path / "base"), tmp_path / "saved/adapter")


@pytest.mark.parametrize(
    "base, remedy",
    [
        ("HuggingFaceTB/SmolLM2-135M", "`hf download HuggingFaceTB/SmolLM2-135M --local-dir DIR`"),
        ("gone", "write there the directory of the adapter's base model"),
        ("", "write there the directory of the adapter's base model"),
        (None, "write there the directory of the adapter's base model"),
    ],
)
def test_an_adapter_whose_base_is_not_here_says_how_to_get_it(opened, base, remedy, tmp_path):
    checkpoints.save(trained(opened().adapt(2)), tmp_path / "saved")
    edit("base_model_name_or_path", base)(tmp_path / "saved/adapter")
    with pytest.raises(ValueError) as caught:
        checkpoints.load(tmp_path / "saved/adapter")
    field = f"{tmp_path}/saved/adapter/adapter_config.json: base_model_name_or_path {base or ''}"
    assert str(caught.value).startswith(f"{field}: there is no such directory; ")
    assert remedy in str(caught.value)


def test_a_classifier_s_adapter_without_its_head_is_refused(opened, tmp_path):
    """A random head would be a reward model that scores at random."""
    checkpoints.save(opened(head="score", name="scorer").adapt(2), tmp_path / "saved")
    drop_one("score.weight")(tmp_path / "saved/adapter")
    with pytest.raises(ValueError, match="without its score.weight"):
        checkpoints.load(tmp_path / "saved/adapter")


def test_an_adapter_that_is_its_own_base_is_refused(opened, tmp_path):
    """Also in a circle of two."""
    checkpoints.save(opened().adapt(2), tmp_path / "saved")
    adapter, other = tmp_path / "saved/adapter", tmp_path / "other"
    shutil.copytree(adapter, other)
    for base in (adapter, other):
        edit("base_model_name_or_path", str(base))(adapter)
        edit("base_model_name_or_path", str(adapter))(other)
        with pytest.raises(ValueError, match="adapter: .* is, in the end, itself"):
            checkpoints.load(adapter)


def test_an_adapter_for_a_deeper_model_is_refused(opened, tmp_path):
    checkpoints.save(opened(layers=3, name="deep").adapt(2), tmp_path / "saved")
    with pytest.raises(ValueError, match="no place.*layers.2"):
        load_adapter(opened(), tmp_path / "saved/adapter")


# -------------------------------------------------------------------------------------- four stages


STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}


def measured_run(script, flags):
    """Runs a stage -> the bytes of its models' weights, and the most bytes that its tensors held at
    once, as torch's profiler measures it from the line about memory on."""
    memory, finish, times = run.Job.memory, run.Job.finish, {}

    def began(job, **models):
        memory(job, **models)
        times["weights"] = bytes_of(*models.values())
        times["first"] = time.time_ns()

    def ended(job, *arguments, **facts):
        times["last"] = time.time_ns()
        finish(job, *arguments, **facts)

    cpu = torch.profiler.ProfilerActivity.CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Job, "memory", began)
        patch.setattr(run.Job, "finish", ended)
        patch.setattr(run.pictures, "curves", lambda metrics, path: None)
        config = run.parse(script.Config, list(map(str, flags)))
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            script.main(config)
    events = profile.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = [e.nbytes() for e in events if times["first"] < e.start_ns() < times["last"]]
    return times["weights"], times["weights"] + max(itertools.accumulate(sizes))


RAGGED = pytest.param("ragged rows", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["rows of one length", RAGGED])
def measured(request, tmp_path_factory):
    """({stage: (bytes of the weights, bytes at the peak)}, directory) of the four stages with LoRA,
    each from the one before."""
    home, ragged = tmp_path_factory.mktemp("stages"), request.param == "ragged rows"
    pairs = home / "pairs.jsonl"
    rows = [(a, b, 1 + (a * b) % 6 if ragged else 5) for a in range(10, 18) for b in range(10, 18)]
    rows = (
        dict(prompt=f"add {a} and {b} " * n, chosen=f" {a + b}" * n, rejected=f" {b}5")
        for a, b, n in rows
    )
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    encoding = chat.extend(tokenizer.load(world.TOKENIZER))
    checkpoints.save(GPT.from_scratch("gpt2:2x128x128", encoding.n_vocab), home / "base", encoding)
    common = ["--data", pairs, "--steps", 2, "--batch-size", 16, "--lora-rank", 4, "--lr", 1e-3]
    common += ["--device", "cpu"]
    flags = {name: ["--init", home / ("base" if name == "sft" else "sft")] for name in STAGES}
    flags["ppo"] += ["--reward", home / "reward", "--max-new-tokens", 8]
    sizes = {}
    for name, script in STAGES.items():
        sizes[name] = measured_run(script, [*flags[name], *common, "--out", home / name])
    return sizes, home


def test_ppo_needs_little_more_than_sft(measured):
    sizes, _ = measured
    assert sizes["ppo"][1] <= 1.4 * sizes["sft"][1]
    assert sizes["ppo"][0] <= 1.1 * sizes["sft"][0]  # four models, one trunk


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_a_whole_model_and_its_adapter(measured, stage):
    home = measured[1]
    model = checkpoints.load(home / stage)
    init = home / ("base" if stage == "sft" else "sft")
    base = checkpoints.load(init, head=model.config.head)
    beside = load_adapter(base, home / stage / "adapter")
    torch.testing.assert_close(beside(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert torch.equal(base.embed.weight, model.embed.weight) and beside.rank == 4
