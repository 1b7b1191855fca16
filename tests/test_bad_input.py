"""Bad input ends in one sentence on standard error and exit code 2, and nothing is written or
overwritten.

Scripts are called in this process, the way `python sft.py ...` calls them; two tests start a real
process."""

import json
import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiktoken
import torch

import dpo
import ppo
import reward
import run
import sft
from data import annotators, checkpoints, rejection, tokenizer
from evaluate import measures
from model import GPT

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}
SCRIPTS |= {"annotators": annotators, "rejection": rejection}
STAGES = ["sft", "reward", "dpo", "ppo"]  # those that read files and write run directories
COMPARING = ["reward", "dpo", "annotators"]  # those that have the world's replies compared
CONTEXT = 64


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def pair(question="add 1 and 2", chosen="3", rejected="4"):
    """A record that every stage can read: as a demonstration, as a comparison, as a prompt."""
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def good(n=4):
    return [pair(f"add {i} and 2", str(i + 2), str(i + 1)) for i in range(n)]


LONG = pair("add 1 and 2 " * 40)  # hundreds of tokens


def checkpoint(directory, encoding, head="lm", rows=None, context=CONTEXT):
    """A run directory as a stage would leave it, without the training."""
    torch.manual_seed(0)
    model = GPT.from_scratch(f"llama:1x32x{context}", rows or encoding.n_vocab, head)
    checkpoints.save(model, directory)
    tokenizer.save(encoding, directory)
    for name in ("run.json", "metrics.jsonl"):
        (directory / name).write_text("{}\n")
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory, world_encoding):
    """Checkpoints by name; every refusal checks that they keep their bytes."""
    home = tmp_path_factory.mktemp("models")
    checkpoint(home / "lm", world_encoding)
    checkpoint(home / "scorer", world_encoding, "score")
    checkpoint(home / "short", world_encoding, context=8)  # shorter than any prompt
    return home


@pytest.fixture
def flags(models):
    """The flags with which a script would do a tiny run; what a test adds afterwards wins."""

    def build(name, data=None):
        values = {"init": models / "lm", "device": "cpu"}
        if name in STAGES:
            values |= {"batch-size": 2, "steps": 1, "lr": 0.001}
        if name == "ppo":
            values |= {"reward": models / "scorer", "max-new-tokens": 4, "minibatches": 1}
        if name in [*COMPARING, "rejection"] and not data:
            values["prompts"] = 8
        files = ["--data", str(data)] if data else []
        return [f"--{flag}={value}" for flag, value in values.items()] + files

    return build


def snapshot(*folders):
    """Every file's bytes, and every directory, by path."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def call(monkeypatch, name, *argv):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    script = SCRIPTS[name]
    run.script(script.main, script.Config, script.__doc__)


@pytest.fixture
def refused(place, models, monkeypatch, capsys, counts):
    """refused(script, flags...): asserts exit code 2, one sentence and nothing written; gives the
    sentence."""

    def check(name, *argv):
        before = snapshot(place, models)
        with pytest.raises(SystemExit) as exit:
            call(monkeypatch, name, *argv)
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert exit.value.code == 2
        assert lines[-1].startswith("error: "), captured.err
        assert sum("error: " in line for line in lines) == 1, captured.err
        assert len(lines[-1]) > len("error: ") + 20 and "Traceback" not in captured.err
        assert captured.out == ""
        assert snapshot(place, models) == before
        counts["bad inputs"] += 1
        return lines[-1]

    return check


@pytest.fixture
def works(place, monkeypatch, capsys):
    """works(script, flags...): a run that ends well; gives what it said."""

    def check(name, *argv):
        call(monkeypatch, name, *argv)
        return capsys.readouterr().err

    return check


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", STAGES)
def test_missing_file_is_named(name, refused, flags):
    assert "nowhere.jsonl: there is no such file" in refused(name, *flags(name, "nowhere.jsonl"))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_file_is_named(name, text, place, refused, flags):
    (place / "empty.jsonl").write_text(text)
    assert "empty.jsonl: is empty" in refused(name, *flags(name, "empty.jsonl"))


@pytest.mark.parametrize("name", STAGES)
def test_malformed_json_names_file_and_line(name, place, refused, flags):
    write(place / "bad.jsonl", *good(2), '{"prompt": "add 1 and 2", "chosen": "3", ', *good(1))
    assert re.search(r"bad\.jsonl:3: is malformed JSON", refused(name, *flags(name, "bad.jsonl")))


@pytest.mark.parametrize("name", STAGES)
def test_unknown_fields_are_named(name, place, refused, flags):
    write(place / "odd.jsonl", {"query": "add 1 and 2", "reply": "3"})
    sentence = refused(name, *flags(name, "odd.jsonl"))
    assert "odd.jsonl:1: has the unknown fields query, reply" in sentence
    assert "known are" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_record_of_another_format_names_its_line(name, place, refused, flags):
    write(place / "mixed.jsonl", *good(2), {"question": "add 1 and 2", "answer": "3"})
    sentence = refused(name, *flags(name, "mixed.jsonl"))
    assert "mixed.jsonl:3: has the fields question, answer, but the file began as" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_field_of_a_wrong_type_names_its_line(name, place, refused, flags):
    write(place / "typed.jsonl", *good(1), pair(question=7))
    sentence = refused(name, *flags(name, "typed.jsonl"))
    assert re.search(r"typed\.jsonl:2: .*number where text belongs", sentence)


@pytest.mark.parametrize("name", STAGES)
def test_file_of_another_kind_says_what_it_holds(name, place, refused, flags):
    write(place / "texts.jsonl", {"text": "the cat sat on the mat"})
    assert "texts.jsonl: holds document records" in refused(name, *flags(name, "texts.jsonl"))


def test_pretraining_refuses_conversations(place, refused, flags):
    write(place / "chats.jsonl", *good())
    sentence = refused("sft", "--pretrain", *flags("sft", "chats.jsonl"))
    assert "cannot be read as document records" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_second_file_is_checked_before_anything_is_written(name, place, refused, flags):
    write(place / "good.jsonl", *good())
    assert "nowhere.jsonl" in refused(name, *flags(name, "good.jsonl"), "nowhere.jsonl")


# ------------------------------------------------------------------- records with nothing to learn


EMPTY = {  # stage -> a record of no use to it, and the reason that it should give
    "sft": (pair(chosen=" "), "empty chosen"),
    "reward": (pair(rejected=""), "empty rejected"),
    "dpo": (pair(chosen=""), "empty chosen"),
    "ppo": (pair(question=""), "empty prompt"),
}


@pytest.mark.parametrize("name", STAGES)
def test_empty_records_are_dropped_with_a_count(name, place, works, flags, caplog):
    record, reason = EMPTY[name]
    write(place / "some.jsonl", *good(4), record, record)
    with caplog.at_level(logging.WARNING, "data"):
        works(name, *flags(name, "some.jsonl"), "--out", "out")
    assert f"some.jsonl: 2 of 6 records dropped (2 {reason})" in caplog.text
    assert (place / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", STAGES)
def test_nothing_but_empty_records_is_refused_with_a_count(name, place, refused, flags):
    record, reason = EMPTY[name]
    write(place / "none.jsonl", record, record, record)
    sentence = refused(name, *flags(name, "none.jsonl"))
    assert f"none.jsonl: nothing is left of 3 records (3 {reason})" in sentence


def test_silent_answer_is_dropped_and_its_neighbours_are_learnt(place, works, flags, caplog):
    question, chats = {"role": "user", "content": "add 1 and 2"}, []
    for answer in ("3", "", " ", "three"):
        chats.append({"messages": [question, {"role": "assistant", "content": answer}]})
    write(place / "chats.jsonl", *chats)
    with caplog.at_level(logging.WARNING, "data"):
        said = works("sft", *flags("sft", "chats.jsonl"), "--out", "out")
    assert "chats.jsonl: 2 of 4 records dropped (2 empty answer)" in caplog.text
    assert "sft: 2 examples" in said


def test_conversation_without_an_answer_is_refused(place, refused, flags):
    write(place / "ask.jsonl", {"messages": [{"role": "user", "content": "add 1 and 2"}]})
    sentence = refused("sft", *flags("sft", "ask.jsonl"))
    assert "nothing is left of 1 records (1 no assistant turn)" in sentence


def test_equal_replies_are_no_comparison(place, refused, flags):
    write(place / "same.jsonl", pair(chosen="3", rejected="3"))
    for name in ("reward", "dpo"):
        assert "1 chosen equals rejected" in refused(name, *flags(name, "same.jsonl"))


# ------------------------------------------------------------------------------------- the context


DROPPED = {
    "sft": "4 examples (2 cut to the context, 2 dropped with nothing to learn)",
    "reward": "4 pairs, 2 dropped (too long, or two equal sides)",
    "dpo": "4 pairs, 2 dropped (too long, or two equal sides)",
    "ppo": "4 prompts, 2 dropped for their length",
}


@pytest.mark.parametrize("name", STAGES)
def test_prompts_longer_than_the_context_are_dropped_with_a_count(name, place, works, flags):
    write(place / "some.jsonl", *good(2), LONG, *good(2), LONG)
    assert DROPPED[name] in works(name, *flags(name, "some.jsonl"), "--out", "out")


@pytest.mark.parametrize("name", STAGES)
def test_nothing_but_prompts_longer_than_the_context_is_refused(name, place, refused, flags):
    write(place / "long.jsonl", LONG, LONG)
    sentence = refused(name, *flags(name, "long.jsonl"))
    assert "context" in sentence
    assert "none of the 2 " in sentence or "no record of long.jsonl" in sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_world_that_does_not_fit_the_context_is_refused(name, models, refused, flags):
    words = "context of 8"
    if name == "ppo":
        words = "leaves room for a reply of 4 tokens in the context"
    assert words in refused(name, *flags(name), "--init", models / "short")


def test_reply_longer_than_the_context_is_refused(refused, flags):
    sentence = refused("ppo", *flags("ppo"), "--max-new-tokens", CONTEXT)
    assert f"leaves room for a reply of {CONTEXT} tokens in the context" in sentence


# ----------------------------------------------------------------------- vocabulary and checkpoint


@pytest.mark.parametrize("name", STAGES)
def test_vocabulary_that_is_not_the_checkpoints_own_is_refused(
    name, place, refused, flags, world_encoding
):
    small = tokenizer.train(["add 1 and 2"], 260, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    checkpoint(place / "small", small)
    tokenizer.save(world_encoding, place / "words")
    write(place / "good.jsonl", *good())
    given = [*flags(name, "good.jsonl"), "--init", "small", "--tokenizer", "words"]
    other = "--tokenizer words has another vocabulary than the one that small was trained with"
    assert other in refused(name, *given)


@pytest.mark.parametrize("name", STAGES)
def test_vocabulary_much_smaller_than_the_model_is_refused(
    name, place, refused, flags, world_encoding
):
    checkpoint(place / "large", world_encoding, rows=5000)
    write(place / "good.jsonl", *good())
    sentence = refused(name, *flags(name, "good.jsonl"), "--init", "large")
    assert "does not fit a model with 5000 embeddings" in sentence and "--tokenizer" in sentence


def test_reward_model_with_another_vocabulary_of_the_same_size_is_refused(
    place, refused, flags, world_encoding
):
    ids = dict(world_encoding._mergeable_ranks)
    a, b = list(ids)[-2:]
    ids[a], ids[b] = ids[b], ids[a]  # every size fits, and two words have changed places
    options = {"special_tokens": world_encoding._special_tokens, "mergeable_ranks": ids}
    swapped = tiktoken.Encoding("swapped", pat_str=world_encoding._pat_str, **options)
    checkpoint(place / "other", swapped, "score")
    sentence = refused("ppo", *flags("ppo"), "--reward", "other")
    assert "other has another vocabulary" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_missing_or_malformed_tokenizer_is_named(name, place, models, refused, flags):
    (place / "bare").mkdir()
    (place / "bad").mkdir()
    (place / "bad" / "tokenizer.json").write_text('{"model": ')
    for directory, words in (
        ("nowhere", "no tokenizer at nowhere"),
        ("bare", "bare holds no tokenizer that can be read"),
        ("bad", "bad/tokenizer.json:1: is malformed JSON"),
    ):
        assert words in refused(name, *flags(name), "--tokenizer", directory)


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_init_says_which_flag_and_what_to_do(name, refused, flags):
    sentence = refused(name, *flags(name), "--init", "nowhere")
    assert "--init nowhere: there is no such directory" in sentence
    assert "before, or name a checkpoint" in sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_name_on_the_hub_gets_the_hub_s_own_command(name, refused, flags):
    hub = "Qwen/Qwen2.5-0.5B"
    sentence = refused(name, *flags(name), "--init", hub)
    assert f"--init {hub}: there is no such directory; nothing is downloaded here" in sentence
    assert f"`hf download {hub} --local-dir DIR`" in sentence


def test_a_name_on_the_hub_gets_its_command_from_evaluation_too(place):
    for name in ("Qwen/Qwen2.5-0.5B", "gpt2/small.v1"):
        with pytest.raises(ValueError, match=f"{name}: there is .* `hf download {name} "):
            measures.open_run(name)
    (place / "models").mkdir()
    for name in ("models/sft", "nowhere", "/gone/sft", "out/sft"):
        with pytest.raises(ValueError, match=f"{name}: there is no such directory; name a run"):
            measures.open_run(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_missing_stage_before_is_named(name, refused):
    before = "out/base" if name == "sft" else "out/sft"
    assert f"--init {before}: there is no such directory" in refused(name)


def test_missing_reward_model_is_named(refused, flags):
    sentence = refused("ppo", *flags("ppo"), "--reward", "nowhere")
    assert "--reward nowhere: there is no such directory" in sentence


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def damage_config(directory):
    (directory / "config.json").write_text('{"model_type": "llama", ')
    return "config.json:1: is malformed JSON"


def other_architecture(directory):
    change_config(directory, model_type="mamba")
    return "'mamba' is not supported"


def no_config(directory):
    (directory / "config.json").unlink()
    return "config.json does not exist"


def no_weights(directory):
    (directory / "model.safetensors").unlink()
    return "model.safetensors does not exist"


def half_the_weights(directory):
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "model.safetensors is not a whole safetensors file"


def wrong_shape(directory):
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    change_config(directory, vocab_size=rows + 1)
    return "config.json says"


DAMAGES = [damage_config, other_architecture, no_config, no_weights, half_the_weights, wrong_shape]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", SCRIPTS)
def test_damaged_checkpoint_is_named(name, damage, place, refused, flags, world_encoding):
    words = damage(checkpoint(place / "damaged", world_encoding))
    sentence = refused(name, *flags(name), "--init", "damaged")
    assert "damaged" in sentence and words in sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_reward_model_is_no_policy(name, models, refused, flags):
    sentence = refused(name, *flags(name), "--init", models / "scorer")
    assert f"--init {models / 'scorer'} has a scalar head" in sentence


def test_reward_training_may_go_on_from_a_reward_model_when_files_give_the_pairs(
    place, models, works, flags
):
    write(place / "good.jsonl", *good())
    works("reward", *flags("reward", "good.jsonl"), "--init", models / "scorer", "--out", "out")
    assert checkpoints.load(place / "out").config.head == "score"


def test_language_model_is_no_reward_model(models, refused, flags):
    sentence = refused("ppo", *flags("ppo"), "--reward", models / "lm")
    assert f"--reward {models / 'lm'} has no scalar head" in sentence


def test_reward_from_scratch_has_no_replies_to_compare(refused, flags):
    sentence = refused("reward", *flags("reward"), "--init", "scratch")
    assert "--init scratch has no replies to compare" in sentence


# ------------------------------------------------------------------------------------------- flags


BAD_FLAGS = [  # scripts, flag, values, what the sentence says
    (STAGES, "batch-size", ["0", "-3"], "at least 1"),
    (STAGES, "batch-size", ["many"], "invalid int value: 'many'"),
    (STAGES, "steps", ["-1"], "at least"),
    (STAGES, "lr", ["-0.001", "nan", "inf"], "at least 0"),
    (STAGES, "lr", ["high"], "invalid float value: 'high'"),
    (STAGES, "dtype", ["int8"], "float32 or bfloat16"),
    (SCRIPTS, "seed", ["-1", str(2**32)], ""),
    (SCRIPTS, "device", ["tpu", "meta", "cuda:x"], "auto, cpu, cuda"),
    (SCRIPTS, "device", ["cuda:99"], "not on this machine"),
    (COMPARING, "prompts", ["0"], "at least 1"),
    (COMPARING, "agreement", ["0.4", "1", "1.5"], "[0.5, 1)"),
    (["rejection"], "prompts", ["0"], "at least 1"),
    (["rejection"], "samples", ["0"], "at least 1"),
    (["rejection"], "max-new-tokens", ["0"], "at least 1"),
    (["rejection"], "temperature", ["-1", "nan"], "at least 0"),
    (["rejection"], "at-least", ["nan", "inf"], "finite"),
    (["rejection"], "skills", ["juggle"], "--skills must be some of repeat, reverse"),
    (["sft"], "micro-batch-size", ["-1"], "at least 0"),
    (["sft"], "micro-batch-size", ["x"], "invalid int value"),
    (["sft", "reward"], "weight-decay", ["-0.1"], "at least 0"),
    (["sft"], "prompt-weight", ["-1"], "at least 0"),
    (["reward"], "completions", ["0"], "at least 1"),
    (["reward"], "centring", ["-1"], "at least 0"),
    (["dpo"], "beta", ["-0.1", "inf", "nan"], ""),
    (["dpo"], "loss", ["ppo"], "dpo, dpo-nll, ln-dpo, cdpo, robust"),
    (["dpo"], "label-smoothing", ["-0.1", "nan"], ""),
    (["dpo"], "alpha", ["-0.1", "nan"], "at least 0"),
    (STAGES, "steps", ["0"], "at least 1"),
    (STAGES, "lora-alpha", ["0"], "more than 0"),
    (["dpo"], "beta", ["0"], "more than 0"),
    (["ppo"], "beta", ["-0.1", "nan"], "at least 0"),
    (["ppo"], "gamma", ["-0.1", "1.1", "nan"], ""),
    (["ppo"], "lam", ["-0.1", "1.1", "nan"], ""),
    (["ppo"], "temperature", ["0", "-1", "nan"], ""),
    (["ppo"], "clip-eps", ["0", "-1", "nan"], ""),
    (["ppo"], "minibatches", ["0", "3"], ""),  # of a batch of 2
    (["ppo"], "ppo-epochs", ["0"], "at least 1"),
    (["ppo"], "max-new-tokens", ["0"], "at least 1"),
    (["ppo"], "group-size", ["0"], "at least 1"),
    (["ppo"], "critic-warmup", ["-1"], "at least 0"),
    (["ppo"], "critic-lr", ["-1"], "at least 0"),
    (["ppo"], "kl-target", ["-1"], "at least 0"),
    (["ppo"], "kl-budget", ["-1"], "at least 0"),
    (["ppo"], "no-end-score", ["nan"], "finite"),
    (["ppo"], "advantage", ["reinforce"], "gae, rloo, grpo, dr-grpo, dapo"),
    (["ppo"], "clip", ["trpo"], "ppo, gspo, cispo"),
    (["ppo"], "clip-upper", ["0", "nan"], ""),
    (["ppo"], "overlong", ["-1", "5"], ""),  # the limit is 4 tokens
    (["ppo"], "redraw", ["-1"], "at least 0"),
    (["ppo"], "skills", ["juggle"], "--skills must be some of repeat, reverse"),
    (["annotators"], "annotators", ["0"], "at least 1"),
    (["annotators"], "abstain", ["1.5"], "[0, 1]"),
    (["annotators"], "length-bias", ["nan"], ""),
]
BAD_FLAGS = [
    (name, flag, value, words)
    for scripts, flag, values, words in BAD_FLAGS
    for name in scripts
    for value in values
]


@pytest.mark.parametrize(("name", "flag", "value", "words"), BAD_FLAGS)
def test_flag_out_of_range_is_named_with_its_value(
    name, flag, value, words, refused, flags, monkeypatch
):
    # It is refused before a model writes thousands of replies:
    monkeypatch.setattr(annotators, "sample", None)
    sentence = refused(name, *flags(name), f"--{flag}={value}")
    assert f"--{flag}" in sentence and words in sentence and (value in sentence or flag == "seed")


REMEDY = "leave one of them out"
UNREAD = [  # script, flags, what the sentence says
    ("dpo", "--gamma=2", "--gamma is read with --loss simpo only, not with dpo: leave it out"),
    ("dpo", "--lam=.1", "--loss orpo only"),
    ("dpo", "--alpha=.5", "--alpha is read with --loss dpo-nll only, not with dpo: leave it out"),
    ("dpo", "--summed", "--loss ipo only"),
    ("dpo", "--label-smoothing=.1", "--loss cdpo or robust or orpo only"),
    ("dpo", "--desirable-weight=2", "--loss kto only"),
    ("dpo", "--agreement=.6 --data=x.jsonl", f"--agreement is not read with --data: {REMEDY}"),
    ("dpo", "--agreement=.6 --online --judge=world", "--agreement is not read with --judge"),
    ("dpo", "--agreement=.6 --spin", "--agreement is not read with --spin"),
    ("dpo", "--judge=world", "--judge is read with --online only: add it, or leave --judge out"),
    ("reward", "--agreement=.6 --data=x.jsonl", "--agreement is not read with --data"),
    ("reward", "--prompts=9 --data=x.jsonl", "--prompts is not read with --data"),
    ("reward", "--step-labels=outcome", "--step-labels is read with --process only"),
    ("reward", "--process --completions=4", "--step-labels monte-carlo only, not with exact"),
    ("reward", "--process --separator=;", "--separator is read with --data only"),
    ("reward", "--process --centring=.1", "--centring is not read with --process"),
    ("sft", "--prompt-weight=.5", "--prompt-weight is read with --pretrain only"),
    ("sft", "--pretrain --last-only", "--last-only is not read with --pretrain"),
    ("sft", "--pretrain --template=llama3", "--template is not read with --pretrain"),
    ("ppo", "--beta=0 --kl-target=3", "--kl-target is read with --beta only"),
    ("ppo", "--ensemble a r --reward=r", "--ensemble holds --reward: name others"),
    ("ppo", "--group-size=8", "--advantage rloo or grpo or dr-grpo or dapo only, not with gae"),
    ("ppo", "--redraw=2", "--redraw is read with --advantage rloo or"),
    ("ppo", "--clip=gspo", "--clip is read with --advantage rloo or"),
    ("ppo", "--skills=add --data=x.jsonl", "--skills is not read with --data"),
    ("ppo", "--advantage=dapo --kl-loss", "--kl-loss is read with --beta only"),
    ("ppo", "--advantage=rloo --beta=0 --kl-loss", "--kl-loss is read with --beta only"),
    ("ppo", "--kl-loss", "--kl-loss is read with --advantage rloo or grpo or dr-grpo or dapo only"),
    ("ppo", "--advantage=rloo --redraw=1 --stop-on-hacking", "is not read with --redraw"),
    ("annotators", "--data a.jsonl b.jsonl", "--init is not read with --data"),
    ("annotators", "--ratings --judge=x", "--ratings is not read with --judge"),
    ("rejection", "--prompts=9 --data=x.jsonl", "--prompts is not read with --data"),
    ("rejection", "--skills=add --data=x.jsonl", "--skills is not read with --data"),
]
for stage in STAGES:
    UNREAD += [
        (stage, "--lora-alpha=8", "--lora-alpha is read with --lora-rank only"),
        (stage, "--lora-targets=qkv", "--lora-targets is read with --lora-rank only"),
        (stage, "--shape=llama:1x32x64", "--shape is read with --init scratch only, not with"),
    ]


@pytest.mark.parametrize(("name", "given", "words"), UNREAD)
def test_flag_that_nobody_would_read_is_refused(name, given, words, refused, models):
    assert words in refused(name, f"--init={models / 'lm'}", *given.split())


class CheckedError(Exception):
    """No bad input: nobody catches it."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_that_are_read_with_others_only_exist_and_their_defaults_are_never_refused(
    name, place, monkeypatch
):
    config, check_requires, tables = SCRIPTS[name].Config(), run.check_requires, []

    def check(config, requires):
        check_requires(config, requires)
        tables.append(requires)
        raise CheckedError

    monkeypatch.setattr(run, "check_requires", check)
    with pytest.raises(CheckedError):
        SCRIPTS[name].main(config)
    (requires,) = tables
    others = {other for rule in requires.values() for other in rule}
    assert requires and all(hasattr(config, flag) for flag in (*requires, *others))


def test_half_of_the_labels_flipped_says_nothing_at_all(refused, flags):
    sentence = refused("dpo", *flags("dpo"), "--loss=robust", "--label-smoothing=0.5")
    assert "--label-smoothing must be at most 0.499" in sentence


def test_flag_of_the_critic_is_refused_where_there_is_none(refused, flags):
    sentence = refused("ppo", *flags("ppo"), "--advantage=rloo", "--lam=0.9")
    assert "--lam is read with --advantage gae only, not with rloo" in sentence


def test_groups_that_compare_nothing_or_do_not_fill_a_batch_are_refused(refused, flags):
    given = [*flags("ppo"), "--advantage=grpo"]
    sentence = refused("ppo", *given, "--group-size=1")
    assert "--group-size must be at least 2, not 1" in sentence
    sentence = refused("ppo", *given, "--batch-size=6", "--group-size=4")
    assert "--batch-size is no multiple of --group-size 4" in sentence


SHAPES = ["llama", "mamba:1x32x64", "llama:0x32x64", "llama:1x33x64", "llama:1x32x1"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_shape_that_cannot_be_built_is_refused(name, shape, place, models, refused, flags):
    write(place / "good.jsonl", *good())
    given = [*flags(name, "good.jsonl"), "--init", "scratch", "--shape", shape]
    assert f"--shape '{shape}' should read" in refused(name, *given)


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_flag_is_named(name, refused, flags):
    sentence = refused(name, *flags(name), "--learning-rate", "1e-3")
    assert "unrecognized arguments: --learning-rate 1e-3" in sentence and "--help" in sentence


@pytest.mark.parametrize("name", SCRIPTS)
def test_abbreviated_flag_is_refused(name, refused, flags):
    assert "unrecognized arguments: --see 1" in refused(name, *flags(name), "--see", "1")


def test_flag_without_its_value_is_named(refused):
    assert "argument --data: expected at least one argument" in refused("sft", "--data")


# ------------------------------------------------------------------------ what --out holds already


@pytest.mark.parametrize("name", STAGES)
def test_out_that_holds_a_run_is_refused(name, place, refused, flags, world_encoding):
    checkpoint(place / "earlier", world_encoding)
    sentence = refused(name, *flags(name), "--out", "earlier")
    assert "--out earlier already holds a run" in sentence and "--overwrite" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_overwrite_replaces_a_run(name, place, works, flags, world_encoding):
    before = snapshot(checkpoint(place / "earlier", world_encoding))
    write(place / "good.jsonl", *good())
    works(name, *flags(name, "good.jsonl"), "--out", "earlier", "--overwrite")
    assert json.loads((place / "earlier" / "run.json").read_text())["stage"] == name
    assert snapshot(place / "earlier") != before
    assert sorted(path.name for path in place.iterdir()) == ["earlier", "good.jsonl"]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("holds", ["notes.txt", "run.json", "src/code.py"])
def test_out_with_foreign_files_is_refused_even_with_overwrite(name, holds, place, refused, flags):
    (place / "mine" / holds).parent.mkdir(parents=True)
    (place / "mine" / holds).write_text("years of work")
    for overwrite in ([], ["--overwrite"]):
        sentence = refused(name, *flags(name), "--out", "mine", *overwrite)
        assert "mine holds files that are no run of ours" in sentence


@pytest.mark.parametrize("name", STAGES)
def test_default_out_with_foreign_files_is_refused(name, place, refused, flags):
    (place / "out" / name).mkdir(parents=True)
    (place / "out" / name / "notes.txt").write_text("years of work")
    assert f"out/{name} holds files that are no run of ours" in refused(name, *flags(name))


@pytest.mark.parametrize("name", STAGES)
def test_foreign_directory_with_the_working_name_is_refused(name, place, refused, flags):
    (place / "mine.partial").mkdir()
    (place / "mine.partial" / "notes.txt").write_text("years of work")
    sentence = refused(name, *flags(name), "--out", "mine")
    assert "mine.partial holds files that are no run of ours" in sentence


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_out_that_is_a_file_is_refused(overwrite, place, refused, flags):
    (place / "mine").write_text("years of work")
    sentence = refused("sft", *flags("sft"), "--out", "mine", *overwrite)
    assert "mine holds files that are no run of ours" in sentence


def test_out_below_a_file_is_refused(place, refused, flags):
    (place / "file").write_text("a file")
    write(place / "good.jsonl", *good())
    sentence = refused("sft", *flags("sft", "good.jsonl"), "--out", "file/run")
    assert "--out file/run cannot be written" in sentence


@pytest.mark.parametrize("out", [".", "..", "a/.."])
def test_out_without_a_name_is_refused(out, place, refused, flags):
    sentence = refused("sft", *flags("sft"), "--out", out, "--overwrite")
    assert "name a directory of the run's own" in sentence


def test_bad_input_leaves_what_a_killed_run_left(place, refused, flags, world_encoding):
    checkpoint(place / "mine.partial", world_encoding)  # `refused` compares its bytes
    assert "nowhere.jsonl" in refused("sft", *flags("sft", "nowhere.jsonl"), "--out", "mine")


def test_neighbour_with_a_backup_name_survives_a_replacement(place, works, flags, world_encoding):
    checkpoint(place / "mine", world_encoding)
    checkpoint(place / "mine.old", world_encoding)
    before = snapshot(place / "mine.old")
    write(place / "good.jsonl", *good())
    works("sft", *flags("sft", "good.jsonl"), "--out", "mine", "--overwrite")
    assert snapshot(place / "mine.old") == before


FOREIGN = ["years of work", json.dumps(pair("who?", "me", "you")) + "\n", ""]


@pytest.mark.parametrize("text", FOREIGN)
def test_annotators_do_not_overwrite_a_foreign_file(text, place, refused, flags):
    (place / "mine.jsonl").write_text(text)
    sentence = refused("annotators", *flags("annotators"), "--out", "mine.jsonl")
    assert "--out mine.jsonl is there already" in sentence


def test_rejection_sampling_replaces_no_file(place, refused, flags):
    (place / "mine.jsonl").write_text("")
    sentence = refused("rejection", *flags("rejection"), "--out", "mine.jsonl")
    assert "--out mine.jsonl: mine.jsonl is there already: name another file" in sentence
    (place / "its.json").write_text("")
    sentence = refused("rejection", *flags("rejection"), "--out", "its.jsonl")
    assert "--out its.jsonl: its.json is there already: name another file" in sentence


OUTS = [  # --out of rejection sampling, what the sentence says
    ("lm", "--out lm is a directory: name a file"),
    ("file/x.jsonl", "--out file/x.jsonl: file is no directory: name another file"),
    ("file/new/x.jsonl", "file is no directory"),
    ("best.json", "--out best.json: name a file that ends in .jsonl; .json gets the facts"),
    ("", "is a directory: name a file"),
]


@pytest.mark.parametrize(("out", "words"), OUTS)
def test_a_place_for_no_file_is_refused_before_anything_is_sampled(
    out, words, place, refused, flags, monkeypatch
):
    (place / "lm").mkdir()
    (place / "file").write_text("")
    monkeypatch.setattr(annotators, "open_writer", None)
    assert words in refused("rejection", *flags("rejection"), "--out", out)


REWARDS = [  # --reward, what the sentence says
    ("nowhere", "--reward nowhere: there is no such directory"),
    ("rule:lst", "--reward rule:lst: there is no rule 'lst'; there are equals, last,"),
    ("rule:words=x", "--reward rule:words=x: the answer 'x' is no count"),
    ("rule:last", "--reward rule:last: q.jsonl:2: the answer 'five' is no number: give"),
    ("rule:exact", "--reward rule:exact: q.jsonl:3 has no answer: give it a field"),
    ("world", "--reward world: q.jsonl:1 is no question of the embedded world"),
    ("mine.py:none", "--reward mine.py:none: takes other arguments; define none(messages, reply)"),
    ("mine.py:no", "--reward mine.py:no: mine.py has no function no; define it there"),
    ("mine.py", "--reward mine.py: name the function too, as file.py:NAME"),
    ("yours.py:f", "yours.py: there is no such file"),
]


FAILING = [  # --reward, what the sentence says
    ("mine.py:raises", "the function failed: KeyError: 'x' (mine.py:2); correct it"),
    ("mine.py:nan", "the function returned float nan: return a finite number"),
]


@pytest.fixture
def asked(place):
    """Three questions in q.jsonl, with a number, a word and nothing for answers, and mine.py."""
    questions = [{"prompt": f"{i} ?", "ground_truth": a} for i, a in enumerate(["5", "five", ""])]
    write(place / "q.jsonl", *questions)
    source = "def none(): return 1\ndef raises(messages, reply): return {}['x']\n"
    (place / "mine.py").write_text(source + "def nan(messages, reply): return float('nan')\n")


@pytest.mark.parametrize("name", ["ppo", "rejection"])
@pytest.mark.parametrize(("spec", "words"), REWARDS)
def test_reward_that_cannot_be_given_is_refused(spec, words, name, asked, refused, flags):
    assert words in refused(name, *flags(name, "q.jsonl"), "--reward", spec)


@pytest.mark.parametrize(("spec", "words"), FAILING)
def test_function_that_fails_is_named_with_its_record(spec, words, asked, refused, flags):
    sentence = refused("rejection", *flags("rejection", "q.jsonl"), "--reward", spec)
    assert f"--reward {spec}: q.jsonl:1: {words}" in sentence


@pytest.mark.parametrize(("spec", "words"), FAILING)
def test_function_that_fails_while_training_ends_the_run_and_replaces_nothing(
    spec, words, asked, place, flags, monkeypatch, capsys, world_encoding
):
    before = snapshot(checkpoint(place / "mine", world_encoding))
    given = [*flags("ppo", "q.jsonl"), "--out", "mine", "--overwrite", "--reward", spec]
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, "ppo", *given)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in said and said.count("error: ") == 1
    assert re.search(rf"error: --reward {spec}: q\.jsonl:[123]: {re.escape(words)}", said)
    assert snapshot(place / "mine") == before


def test_directory_without_a_checkpoint_is_no_reward_model(place, refused, flags):
    (place / "empty").mkdir()
    sentence = refused("ppo", *flags("ppo"), "--reward", "empty")
    assert "empty" in sentence and "does not exist" in sentence


def test_reward_model_without_a_scalar_head_chooses_nothing(models, refused, flags):
    sentence = refused("rejection", *flags("rejection"), "--reward", models / "lm")
    assert f"--reward {models / 'lm'} has no scalar head" in sentence


def test_no_reply_that_reaches_the_score_is_refused_before_a_file_is_written(refused, flags):
    sentence = refused("rejection", *flags("rejection"), "--at-least", "2")
    assert "no reply ended and reached --at-least: lower it, or raise --samples" in sentence


def test_annotators_replace_their_own_file(place, works, flags):
    works("annotators", *flags("annotators"), "--out", "pairs.jsonl")
    first = (place / "pairs.jsonl").read_bytes()
    works("annotators", *flags("annotators"), "--out", "pairs.jsonl", "--seed", "1")
    assert first != (place / "pairs.jsonl").read_bytes()
    assert [path.name for path in place.iterdir()] == ["pairs.jsonl"]


# ---------------------------------------------------------------------------------------- for real


def command(root, *argv):
    return [sys.executable, root / argv[0], *map(str, argv[1:])]


def test_process_ends_with_code_2_and_one_sentence(root, place, flags):
    words = command(root, "sft.py", *flags("sft", "nowhere.jsonl"))
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: nowhere.jsonl: there is no such file; check the path\n"
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_killed_run_leaves_the_earlier_one_untouched(root, place, flags, world_encoding):
    before = snapshot(checkpoint(place / "mine", world_encoding))
    write(place / "good.jsonl", *good(3), pair(chosen=""))
    argv = [*flags("sft", "good.jsonl"), "--steps", "1000000", "--out", "mine", "--overwrite"]
    options = dict(stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command(root, "sft.py", *argv), **options) as process:
        written, limit = place / "mine.partial" / "metrics.jsonl", time.monotonic() + 60
        while not (written.exists() and written.stat().st_size) and time.monotonic() < limit:
            time.sleep(0.05)
        process.kill()
        stderr = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL
    # the count reaches the terminal
    assert "good.jsonl: 1 of 4 records dropped (1 empty chosen)" in stderr
    assert (place / "mine.partial").is_dir() and snapshot(place / "mine") == before
