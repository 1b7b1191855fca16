"""Checkpoints: directories in the Hugging Face layout, config.json + model.safetensors.

    model = checkpoints.load("out/sft")                  every architecture; fp32 weights
    model = checkpoints.load("out/sft", head="score")    the trunk of a language model, a new head
    checkpoints.save(model, "somewhere", encoding)       transformers opens it
    policy, encoding = checkpoints.open_policy(config, device)      what a stage's flags ask for

architectures.py has the tables of names and the two files, adapters.py the PEFT layout.
"""

import re
from pathlib import Path

import torch
from torch import nn

import run
from data import architectures, chat, tokenizer
from data.adapters import load_adapter, save_adapter
from data.architectures import named_tensors, prefixed, read_json, tensors_of
from data.doors import kind_of
from data.world import TOKENIZER
from model import GPT

# Published files may also hold the causal mask and the rotary table:
BUFFERS = re.compile(r"attn\.(masked_)?bias$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
HEAD = "lm_head.weight"
# Fields of Config in which a model and the trunk that it shares must agree:
TRUNK_FIELDS = "arch vocab_size width layers heads kv_heads head_dim mlp_width context".split()
TRUNK_FIELDS += ["norm_eps", "rope_theta", "rope_scaling", "no_rope"]


@torch.no_grad()
def load(directory, head=None, trunk=None):
    """Opens a checkpoint: one file or shards, any float dtype. An adapter's directory gives its
    base model with the adapter merged.

    head: "score" gives a language model a new scalar head; None keeps the checkpoint's head.
    trunk: a model with adapters. A scalar-head checkpoint of the same frozen weights shares them.
    Raises FileNotFoundError or ValueError for anything missing, unexpected or of a wrong shape.
    """
    directory = Path(directory)
    if is_adapter(directory):
        return load_merged_adapter(directory, head)
    config = architectures.read_config(directory)
    head_of_file = config.head
    config.head = head or config.head
    if trunk is not None and head_of_file == config.head == "score":
        model = load_on_trunk(directory, config, trunk)
        if model is not None:
            return model
    values = tensors_of_checkpoint(directory)
    architectures.check_sizes(directory, config, values)
    model = GPT(config)
    model.origin = str(directory)
    for tensor, value in matching_tensors(directory, values, model, head_of_file):
        tensor.copy_(value)
    return model


def is_adapter(directory):
    """Whether a directory holds an adapter alone."""
    files = [kind_of(directory / f"{name}.json") for name in ("adapter_config", "config")]
    return bool(files[0]) and not files[1]


def base_of(directory):
    """The directory of an adapter's base model, and the adapter's adapter_config.json."""
    path = directory / "adapter_config.json"
    facts = read_json(path)
    base = facts.get("base_model_name_or_path") or ""
    field = f"{path}: base_model_name_or_path"
    run.require(isinstance(base, str), f"{field} should be a text: correct it")
    kind_of(base)  # refuses a name that cannot be looked at
    run.require_directory(base, field, "write there the directory of the adapter's base model")
    return Path(base), facts


def load_merged_adapter(directory, head):
    base, facts = base_of(directory)
    visited = [directory.resolve()]
    while is_adapter(base):  # of a base model, in the end
        visited.append(base.resolve())
        circle = f"{directory}: the base model of its adapter is, in the end, itself"
        run.require(len(visited) == len({*visited}), f"{circle}: correct base_model_name_or_path")
        base, _ = base_of(base)
    if facts.get("task_type") == "SEQ_CLS":
        head = head or "score"
    model = load_adapter(load(base_of(directory)[0], head), directory).merge()
    # a further adapter is added to both, and its file names this one as its base
    model.origin, model.grown = str(directory), []
    return model


def load_on_trunk(directory, config, trunk):
    """The scalar-head model of a directory, on the trunk's own frozen weights; None if it is not an
    adapter of these weights."""
    same_shape = all(getattr(config, f) == getattr(trunk.config, f) for f in TRUNK_FIELDS)
    if not same_shape or not (directory / "adapter").is_dir():
        return None
    model = trunk.reference()
    model.config = config
    model.score_head = nn.Linear(config.width, 1, device=trunk.device)
    nn.init.constant_(model.score_head.bias, config.score_bias)
    model._modules.pop("lm_head", None)
    load_adapter(model, directory / "adapter")
    pairs = matching_tensors(directory, tensors_of_checkpoint(directory), model, "score")
    same = all(torch.allclose(tensor.cpu(), x, rtol=1e-4, atol=1e-6) for tensor, x in pairs)
    return model if same else None


def matching_tensors(directory, values, model, head_of_file):
    """Yields (tensor of the model, its value in the checkpoint), without a head that the checkpoint
    lacks. values: tensors_of_checkpoint's, which are taken out; only one is in memory at a time."""
    for key, tensor in named_tensors(model):
        if key.startswith(architectures.HEADS) and model.config.head != head_of_file:
            continue
        lacking = f"{directory} lacks the tensor {key} that its config.json promises"
        run.require(key in values, f"{lacking}: fetch it again")
        value = values.pop(key)()
        labels = len(value) if key == "score.weight" and value.dim() == 2 else 1
        several = f"{directory} is a classifier with {labels} labels, and a reward model has one"
        run.require(labels == 1, f"{several}: train one with reward.py")
        fits = value.shape == tensor.shape and value.is_floating_point()
        actual = f"{directory}: {key} has shape {tuple(value.shape)} ({value.dtype})"
        run.require(fits, f"{actual}, config.json says {tuple(tensor.shape)}: fetch it again")
        yield tensor, value
    if model.config.tied and model.config.head == head_of_file == "lm" and HEAD in values:
        same = torch.equal(values[HEAD]().to(model.embed.weight), model.embed.weight)
        wrong = f"{directory} holds a {HEAD} that is not the embedding, to which its config.json"
        run.require(same, f"{wrong} ties the head: set tie_word_embeddings to false there")
    # a file may also hold a copy of the tied embedding, or the head that was replaced
    extra = [key for key in values if not BUFFERS.search(key) and key != HEAD]
    wrong = f"{directory} holds a tensor that its config.json does not explain"
    run.require(not extra, f"{wrong}: {''.join(extra[:1])}")


def tensors_of_checkpoint(directory):
    """{name without prefix: Stored, which reads the tensor when it is called}, over all shards."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if kind_of(index):
        shards = read_json(index).get("weight_map")
        valid = isinstance(shards, dict) and shards and all(map(is_file_name, shards.values()))
        run.require(valid, f"{index} is not a readable index of shards: fetch the checkpoint again")
        files = sorted(set(shards.values()))
    values = {}
    for file in files:
        for key, read in tensors_of(directory / file).items():
            name = re.sub(r"^(transformer|model)\.", "", key)
            twice = f"{directory} holds the tensor {name} twice: fetch or save it again"
            run.require(name not in values, twice)
            values[name] = read
    return values


def is_file_name(value):
    """Whether this is the name of a file in the same directory."""
    return isinstance(value, str) and value == Path(value).name


@torch.no_grad()
def save(model, directory, encoding=None, chat=True):
    """Writes config.json and model.safetensors (fp32), with an encoding also the tokenizer (chat:
    with its chat template). Adapters are merged into the weights, and also written to adapter/."""
    directory, config = Path(directory), model.config
    if config.head == "score":
        config.score_bias = float(model.score_head.bias.detach())
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)  # of an earlier checkpoint
    tensors = {prefixed(key, config): value for key, value in named_tensors(model)}
    facts = architectures.write_config(config)
    architectures.write_files(directory, "model.safetensors", tensors, "config.json", facts)
    if model.rank:
        save_adapter(model, directory / "adapter")
    if encoding is not None:
        tokenizer.save(encoding, directory, chat=chat)


def save_run(job, model, encoding, chats=True):
    """Ends a run with its checkpoint, and notes in run.json which chat template it was taught.
    Returns the run's directory."""
    facts = {"template": chat.describe(encoding)} if chats else {}
    return job.finish(lambda directory: save(model, directory, encoding, chats), **facts)


def open_vocabulary(config, default=TOKENIZER, template=""):
    """The vocabulary of --tokenizer, or of --init, or the default, with the chat tokens."""
    return chat.extend(tokenizer.choose(config.tokenizer, config.init, default), template)


def open_model(config, encoding, device, head="lm", chats=True):
    """The model of --init or random weights of --shape, with the adapters of --lora-rank. Raises
    ValueError for a reward model where a language model is needed."""
    if config.init == "scratch":
        check_shape(config.shape, encoding.n_vocab)
        model = GPT.from_scratch(config.shape, encoding.n_vocab, head=head)
    else:
        model = load(config.init, head=None if head == "lm" else head)
    wrong = f"--init {config.init} has a scalar head and cannot write: name a language model"
    run.require(model.config.head == head, wrong)
    new_ids = untaught_ids(model, encoding) if config.lora_rank and chats else []
    model = tokenizer.fit(model, encoding, chat=chats).to(device)
    return model.adapt(config.lora_rank, config.lora_alpha, config.lora_targets, new_ids)


def check_shape(shape, vocab_size):
    """Raises ValueError for a --shape that the memory cannot hold. A malformed one is refused by
    GPT.from_scratch."""
    match = re.fullmatch(r"\w+:(\d+)x(\d+)x(\d+)", shape)
    too_long = f"--shape {shape:.40}... should read llama:4x96x128 or alike"
    run.require(len(shape) < 100, too_long)
    if match:
        layers, width, context = map(int, match.groups())
        weights = 12 * layers * width**2 + vocab_size * width
        architectures.check_memory(f"--shape {shape}", weights, context, position=width)


def untaught_ids(model, encoding):
    """The special tokens of a chat, if the checkpoint was not taught to chat in this way: it has no
    template, or its config.json ends texts elsewhere (Qwen2.5's base models have a template)."""
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    same_end = ends == [None] or chat.stop_ids(encoding)[0] in ends
    if same_end and model.origin and tokenizer.chats(model.origin, encoding):
        return []
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    ids, _ = chat.render(turns, encoding)
    return sorted(set(ids) & set(encoding._special_tokens.values()))


def open_policy(config, device, default=TOKENIZER):
    """(policy, encoding) of a stage's flags. --seed decides the random weights."""
    torch.manual_seed(config.seed)
    encoding = open_vocabulary(config, default)
    return open_model(config, encoding, device), encoding
