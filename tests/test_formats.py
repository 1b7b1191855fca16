"""Every public format reads to the records that its file holds; every trap is dropped with a count;
every bad file is refused in one sentence. The numbers were counted in the sample files (whose
README lists the same traps), not taken from the reader."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from data import formats
from data.collate import encode_pairs
from data.formats import Conversation, Document, Preference, Process, Prompt, Unpaired

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the sample files {SHARED} are not on this machine"
)


TURNS_IN = ("messages", "prompt", "chosen", "rejected", "completion")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture
def jsonl(tmp_path):
    """Writes records as JSONL and gives the path."""

    def write(*records, name="file.jsonl"):
        path = tmp_path / name
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
            encoding="utf-8",
        )
        return path

    return write


@pytest.fixture
def raw(tmp_path):
    """Writes bytes or a string as they are and gives the path."""

    def write(content, name="file.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, kind=None):
    """The sentence that refuses a file: one line with its name, a remedy after a semicolon."""
    with pytest.raises(ValueError) as caught:
        formats.read(path, kind)
    sentence = str(caught.value)
    assert type(caught.value) is ValueError
    assert sentence.startswith(str(path)) and "\n" not in sentence and "; " in sentence
    return sentence


# --------------------------- the sample files: records in their README minus its documented drops

T0 = """
    common_gen_Given_concepts_type_1 common_gen_sentence_to_concepts
    commonsense_qa_question_answering quarel_choose_between quartz_answer_question_below
    qasc_is_correct_1 kilt_tasks_hotpotqa_straighforward_qa cosmos_qa_only_question_answer
    social_i_qa_Generate_answer
    dbpedia_14_given_a_list_of_category_what_does_the_title_belong_to
""".split()
SUPER_NI = "instruct/super_ni"
HH_DROPS = {"empty chosen": 4, "prompts of the two sides differ": 2}
RASBT_PAIRS = "preference/rasbt_instruction-data-with-preference.json"
# 57 pairs have equal scores. One of them is the equal pair (306), none is the empty one (478).
ULTRA_DROPS = {"tie": 57, "empty rejected": 1}
SAMPLES = [  # file, kind, records in it, dropped by reason
    ("instruct/alpaca_data_1k.json", Conversation, 750, {}),
    ("instruct/alpaca_en_demo.json", Conversation, 700, {}),
    ("instruct/rasbt_instruction-data.json", Conversation, 880, {}),
    ("instruct/gpteacher_roleplay.json", Conversation, 300, {}),
    ("instruct/dolly_templated.jsonl", Conversation, 110, {}),
    ("instruct/seed_tasks.jsonl", Conversation, 175, {}),
    (f"{SUPER_NI}/task142_odd-man-out_classification_no_category.json", Conversation, 6500, {}),
    (f"{SUPER_NI}/task156_codah_classification_adversarial.json", Conversation, 2771, {}),
    ("instruct/t0_templates/paws_labeled_final_paraphrase_task.jsonl", Conversation, 91, {}),
    *((f"instruct/t0_templates/{name}.jsonl", Conversation, 200, {}) for name in T0),
    ("chat/oasst_en_100_tree.jsonl", Conversation, 70, {}),
    ("chat/glaive_toolcall_en_demo.json", Conversation, 200, {}),
    ("chat/sharegpt_zh_1K_format.jsonl", Conversation, 149, {}),
    ("process/gsm8k/train.jsonl", Conversation, 2500, {}),
    ("process/gsm8k/test.jsonl", Conversation, 300, {}),
    ("process/math_test500.jsonl", Conversation, 300, {}),
    ("process/prm800k_samples.jsonl", Process, 4, {}),
    ("process/math-shepherd_samples.jsonl", Process, 5, {}),
    ("prompts/mt_bench_question.jsonl", Prompt, 80, {}),
    ("preference/hh-rlhf/harmless-base.test.jsonl.gz", Preference, 1800, HH_DROPS),
    ("preference/hhh_438_evaluations.jsonl", Preference, 300, {}),
    (RASBT_PAIRS, Preference, 880, {"chosen equals rejected": 6}),
    ("preference/ultrafeedback_train_clean.jsonl", Preference, 500, ULTRA_DROPS),
    ("preference/alpaca_eval_alpaca-7b_annotations.json", Preference, 473, {"tie": 7}),
    ("preference/dpo_en_demo.json", Preference, 200, {}),
    ("preference/kto_en_demo.json", Unpaired, 200, {}),
    ("preference/llmbar/Natural.json", Preference, 100, {}),
    ("preference/llmbar/Adversarial_Neighbor.json", Preference, 134, {}),
    ("constitution/RLMadisonFewShotPrompts.json", Preference, 5, {}),
    ("constitution/RLMadisonPrecogFewShotPrompts.json", Prompt, 6, {}),
    ("constitution/samples/PALMS_SLMADISON.jsonl", Conversation, 40, {}),
    ("constitution/samples/PALMS_RLMADISON.jsonl", Preference, 40, {}),
    ("corpus/c4_demo.jsonl", Document, 250, {}),
    ("corpus/wiki_demo.txt", Document, 24, {}),  # one article a line
    ("corpus/tinyshakespeare.txt", Document, 7222, {}),  # speeches, between blank lines
    ("corpus/wikitext-2.test.txt", Document, 1320, {}),  # paragraphs, between lines of one space
]


@needs_shared
@pytest.mark.parametrize(
    ("name", "kind", "count", "drops"), SAMPLES, ids=[sample[0] for sample in SAMPLES]
)
def test_sample_file_gives_its_documented_count_minus_its_documented_drops(
    name, kind, count, drops, caplog
):
    records = formats.read(SHARED / name)
    assert {type(record) for record in records} == {kind}
    assert len(records) == count - sum(drops.values())
    assert all(record.where.startswith(str(SHARED / name)) for record in records)
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name == "data" and "dropped" in record.getMessage()
    ]
    reasons = ", ".join(f"{n} {reason}" for reason, n in drops.items())
    report = f"{Path(name).name}: {sum(drops.values())} of {count} records dropped ({reasons})"
    assert lines == ([report] if drops else [])


@needs_shared
def test_every_sample_file_is_either_tested_or_refused():
    tested = {name for name, *_ in SAMPLES}
    refused = {path.relative_to(SHARED).as_posix() for path in SHARED.rglob("*.json*")} - tested
    assert refused == {
        "constitution/CritiqueRevisionInstructions.json",
        "constitution/CritiqueRevisionFewShotPrompts.json",
        "constitution/RLMadisonInstructions.json",
        "instruct/t0_templates/trec_fine_grained_ABBR.jsonl",
        "tokenizer/gpt2/encoder.json",
    }
    sentences = {name: refusal(SHARED / name) for name in refused}
    assert "is empty" in sentences["instruct/t0_templates/trec_fine_grained_ABBR.jsonl"]
    assert all(
        "constitution, its principles" in sentence
        for name, sentence in sentences.items()
        if name.startswith("constitution")
    )


@needs_shared
@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        # user turns with two or more ranked replies
        ("chat/oasst_en_100_tree.jsonl", "preference", 146),
        ("chat/oasst_en_100_tree.jsonl", "unpaired", 292),
        ("chat/oasst_en_100_tree.jsonl", "prompt", 70),
        # a pair with an empty answer still has its prompt, a pair with two prompts has none
        ("preference/hh-rlhf/harmless-base.test.jsonl.gz", "prompt", 1798),
        ("preference/hh-rlhf/harmless-base.test.jsonl.gz", "unpaired", 2 * 1794),
        ("preference/rasbt_instruction-data-with-preference.json", "conversation", 874),
        ("preference/kto_en_demo.json", "prompt", 200),
        ("process/gsm8k/test.jsonl", "prompt", 300),
        ("process/prm800k_samples.jsonl", "prompt", 4),
    ],
)
def test_sample_file_gives_its_other_readings(name, kind, count):
    assert len(formats.read(SHARED / name, kind)) == count


@needs_shared
@pytest.mark.parametrize(
    ("name", "places"),
    [
        (
            "preference/hh-rlhf/harmless-base.test.jsonl.gz",
            [f":{n + 1}" for n in (86, 516, 925, 1103, 1254, 1688)],
        ),
        (
            "preference/rasbt_instruction-data-with-preference.json",
            [f": record {n}" for n in (122, 226, 400, 566, 628, 676)],
        ),
        ("preference/ultrafeedback_train_clean.jsonl", [":307", ":479"]),
    ],
)
def test_the_documented_bad_records_are_the_ones_that_are_dropped(name, places):
    kept = {record.where for record in formats.read(SHARED / name)}
    assert not kept & {f"{SHARED / name}{place}" for place in places}


@needs_shared
def test_no_sample_text_ends_in_an_end_marker_or_in_a_turn_mark():
    roles = ("system", "user", "assistant", "tool")
    markers = ("<|endoftext|>", "###eos_token###", "\n\nHuman:", "\n\nAssistant:")
    for name in (sample[0] for sample in SAMPLES if sample[0].split("/")[0] != "corpus"):
        for record in formats.read(SHARED / name):
            for message in (one for field in TURNS_IN for one in getattr(record, field, [])):
                assert set(message) == {"role", "content"} and message["role"] in roles
                assert not message["content"].rstrip().endswith(markers), record.where


@needs_shared
def test_prm800k_samples_hold_one_path_each_and_keep_the_other_candidates_apart():
    records = formats.read(SHARED / "process/prm800k_samples.jsonl")
    assert [record.labels for record in records] == [
        # step 1 was written by the labeller, since all five candidates were bad
        [1, None, 1, 1, 1, 1],
        # nothing was chosen at the last step: the model's own step, a mistake, ends the path
        [1, 0, 1, 1, 1, 1, -1],
        [1] * 5,
        [1] * 7,
    ]
    assert [len(record.alternatives) for record in records] == [5 + 4, 3, 6, 6]
    assert records[0].alternatives[0] == (
        1,
        "The first equation is 3p + e = 124, and the second equation is 5p + e = 182.",
        -1,
    )
    assert records[0].steps[1] == "We have $3p+e=1.24$ and $5p+e=1.82$."


@needs_shared
def test_gsm8k_record_with_an_escaped_line_separator_is_whole():
    record = formats.read(SHARED / "process/gsm8k/train.jsonl")[2381]
    assert record.where.endswith("train.jsonl:2382") and "\u2028" in "".join(
        one["content"] for one in record.messages
    )


@needs_shared
def test_glaive_calls_are_the_assistants_and_observations_are_the_tools():
    roles = [
        [one["role"] for one in record.messages]
        for record in formats.read(SHARED / "chat/glaive_toolcall_en_demo.json")
    ]
    assert sum(role == "tool" for row in roles for role in row) == 137
    assert sum(row[0] == "system" for row in roles) == 200 - 81  # "tools" is "[]" in 81 records


# ---------------------------------------------------------------- each format, small


FORMATS = [  # one record, what it reads to (without where)
    (
        {"messages": [system("be kind"), user("hi"), assistant("hello")]},
        Conversation([system("be kind"), user("hi"), assistant("hello")], ""),
    ),
    (
        {"instruction": "Sort.", "input": "2 1", "output": "1 2"},
        Conversation([user("Sort.\n\n2 1"), assistant("1 2")], ""),
    ),
    (
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        Conversation([user("Say hi."), assistant("hi")], ""),
    ),
    (
        {"instruction": "Say hi.", "input": "<noinput>", "output": "hi"},
        Conversation([user("Say hi."), assistant("hi")], ""),
    ),
    (
        {"instruction": "Say hi.", "output": "hi", "system": "s"},
        Conversation([system("s"), user("Say hi."), assistant("hi")], ""),
    ),
    (
        {
            "instruction": "Who?",
            "context": "It was me.",
            "response": "Me.",
            "category": "closed_qa",
        },
        Conversation([user("Who?\n\nIt was me."), assistant("Me.")], ""),
    ),
    (
        {
            "prompt": "Below is an instruction that describes a task, paired with an input. Write "
            "a response.\n\n### Instruction:\nWho?\n\n### Input:\nIt was me.\n\n### Response:",
            "answer": "Me.###eos_token###",
        },
        Conversation([user("Who?\n\nIt was me."), assistant("Me.")], ""),
    ),
    (
        {"prompt": "2 + 2?\n", "completion": "4<|endoftext|>"},
        Conversation([user("2 + 2?\n"), assistant("4")], ""),
    ),
    (
        {"prompt": [user("2 + 2?")], "completion": [assistant("4")]},
        Conversation([user("2 + 2?"), assistant("4")], ""),
    ),
    (
        {"inputs": "2 + 2?", "targets": "4", "task": "sum"},
        Conversation([user("2 + 2?"), assistant("4")], ""),
    ),
    (
        {
            "id": "t",
            "name": "n",
            "instruction": "Sort.",
            "instances": [{"input": "2 1", "output": "1 2"}],
            "is_classification": False,
        },
        Conversation([user("Sort.\n\n2 1"), assistant("1 2")], ""),
    ),
    (
        {"conversations": [{"from": "Human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        Conversation([user("hi"), assistant("yo")], ""),
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "rain?"},
                {"from": "function_call", "value": "rain()"},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "No."},
            ],
            "tools": "[]",
        },
        Conversation(
            [
                system("s"),
                user("rain?"),
                assistant("rain()"),
                {"role": "tool", "content": "no"},
                assistant("No."),
            ],
            "",
        ),
    ),
    (
        {"conversations": [user("hi"), assistant("yo")], "tools": '["rain"]'},
        Conversation([system('["rain"]'), user("hi"), assistant("yo")], ""),
    ),
    (
        {"question": "2 + 2?", "answer": "<<2+2=4>>4\n#### 4"},
        Conversation([user("2 + 2?"), assistant("<<2+2=4>>4\n#### 4")], ""),
    ),
    (
        {"problem": "2 + 2?", "solution": "\\boxed{4}", "answer": "4"},
        Conversation([user("2 + 2?"), assistant("\\boxed{4}")], ""),
    ),
    (
        {
            "rl_prompt": "\n\nHuman: hi\n\nAssistant:",
            "cst": [{"revision": {"sample": " one"}}, {"revision": {"sample": " two"}}],
        },
        Conversation([user("hi"), assistant("two")], ""),
    ),
    (
        {"prompt": "2?", "chosen": "yes", "rejected": "no"},
        Preference([user("2?")], [assistant("yes")], [assistant("no")], ""),
    ),
    (
        {"prompt": "2?", "chosen": "yes", "rejected": "no", "label": 0.7, "margin": 2},
        Preference([user("2?")], [assistant("yes")], [assistant("no")], "", 0.7, 2.0),
    ),
    (  # UltraFeedback as on the hub: the sides repeat the prompt
        {
            "prompt": "2?",
            "chosen": [user("2?"), assistant("yes")],
            "rejected": [user("2?"), assistant("no")],
            "score_chosen": 8,
            "score_rejected": 7,
        },
        Preference([user("2?")], [assistant("yes")], [assistant("no")], ""),
    ),
    (
        {"chosen": [user("2?"), assistant("yes")], "rejected": [user("2?"), assistant("no")]},
        Preference([user("2?")], [assistant("yes")], [assistant("no")], ""),
    ),
    (
        {
            "prompt": [system("s"), user("2?")],
            "chosen": [assistant("yes")],
            "rejected": [assistant("no")],
        },
        Preference([system("s"), user("2?")], [assistant("yes")], [assistant("no")], ""),
    ),
    (
        {
            "conversations": [{"from": "human", "value": "2?"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        Preference([user("2?")], [assistant("yes")], [assistant("no")], ""),
    ),
    (  # "output" is the rejected side here, as in half of that file
        {"instruction": "Sort.", "input": "2 1", "output": "no", "rejected": "no", "chosen": "yes"},
        Preference([user("Sort.\n\n2 1")], [assistant("yes")], [assistant("no")], ""),
    ),
    (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
        Preference([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")], ""),
    ),
    (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "b", "rejected": "c"},
        Preference([user("a")], [assistant("b")], [assistant("c")], ""),
    ),
    (
        {
            "prompt": "(A) or (B)?",
            "text_correct": "\n\nHuman: a\n\nAssistant: b",
            "text_incorrect": "\n\nHuman: a\n\nAssistant: c",
        },
        Preference([user("a")], [assistant("b")], [assistant("c")], ""),
    ),
    (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "corrects": ["b"], "incorrects": ["c"]},
        Preference([user("a")], [assistant("b")], [assistant("c")], ""),
    ),
    (
        {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 2},
        Preference([user("a")], [assistant("c")], [assistant("b")], ""),
    ),
    (  # AlpacaEval 2: the weighted judge. 1.25 says output_1 with probability 3/4
        {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.25},
        Preference([user("a")], [assistant("b")], [assistant("c")], "", 0.75),
    ),
    (
        {"input": "a", "output_1": "b", "output_2": "c", "label": 1},
        Preference([user("a")], [assistant("b")], [assistant("c")], ""),
    ),
    (  # chosen shows the behaviour that the file is named after, whatever it is worth
        {
            "question": 'Is the following something you would say?\n"i like art"',
            "statement": "i like art",
            "label_confidence": 0.97,
            "answer_matching_behavior": " Yes",
            "answer_not_matching_behavior": " No",
        },
        Preference(
            [user('Is the following something you would say?\n"i like art"')],
            [assistant(" Yes")],
            [assistant(" No")],
            "",
            0.97,
        ),
    ),
    (  # HelpSteer3: below 0 response1 is better. Two of three votes
        {
            "domain": "general",
            "context": [user("a"), assistant("b"), user("c")],
            "response1": "d",
            "response2": "e",
            "overall_preference": -1,
            "individual_preference": [
                {"score": -2, "reasoning": "r", "feedback1": "f", "feedback2": "g"},
                {"score": 1, "reasoning": "r", "feedback1": "f", "feedback2": "g"},
                {"score": -3, "reasoning": "r", "feedback1": "f", "feedback2": "g"},
            ],
        },
        Preference(
            [user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")], "", 2 / 3
        ),
    ),
    (  # HelpSteer2: a vote for each side's half, and one that finds neither answer valid (-100)
        {
            "split": "train",
            "prompt": "a",
            "response_1": "b",
            "response_2": "c",
            "preference_strength": 1,
            "all_preferences_unprocessed": [
                {"strength": 0, "justification": "j"},
                {"strength": 2, "justification": "j"},
                {"strength": -100, "justification": "j"},
            ],
        },
        Preference([user("a")], [assistant("c")], [assistant("b")], "", 0.75),
    ),
    (  # MultiPref: the votes of both groups of workers
        {
            "comparison_id": "x",
            "text": "a",
            "model_a": "m",
            "completion_a": "b",
            "model_b": "n",
            "completion_b": "c",
            "normal_worker_annotations": [
                {"evaluator": "1", "overall_pref": "A-is-slightly-better"},
                {"evaluator": "2", "overall_pref": "B-is-clearly-better"},
            ],
            "expert_worker_annotations": [
                {"evaluator": "3", "overall_pref": "A-is-clearly-better"},
                {"evaluator": "4", "overall_pref": "A-is-clearly-better"},
            ],
        },
        Preference([user("a")], [assistant("b")], [assistant("c")], "", 0.75),
    ),
    (
        {
            "instruction": "a",
            "output_1": "b",
            "output_2": "c",
            "annotations": [
                {"annotator": "x", "preference": 2},
                {"annotator": "y", "preference": 2},
                {"annotator": "z", "preference": 1},
                {"annotator": "w", "preference": 2},
            ],
        },
        Preference([user("a")], [assistant("c")], [assistant("b")], "", 0.75),
    ),
    (
        {"prompt": "a", "output_1": "b", "output_2": "c", "votes": [1, 1, 1, 2, 2]},
        Preference([user("a")], [assistant("b")], [assistant("c")], "", 0.6),
    ),
    (
        {
            "source": "s",
            "instruction": "a",
            "completions": [
                {"response": "mid", "overall_score": 5.0},
                {"response": "best", "overall_score": 8.5},
                {"response": "worst", "overall_score": 1.0},
            ],
        },
        Preference([user("a")], [assistant("best")], [assistant("worst")], ""),
    ),
    (
        {
            "rl_prompt": "\n\nHuman: a\n\nAssistant:",
            "sampled_answers": [
                {"sampled_string": " mid", "pm_scores": [{"pm_score": 0}]},
                {"sampled_string": " best\n\nHuman:", "pm_scores": [{"pm_score": 2.5}]},
                {"sampled_string": " worst", "pm_scores": [{"pm_score": -1.5}]},
            ],
        },
        Preference([user("a")], [assistant("best")], [assistant("worst")], ""),
    ),
    (
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": True},
        Unpaired([user("a"), assistant("b"), user("c")], [assistant("d")], True, ""),
    ),
    (
        {"prompt": "a", "completion": "b", "label": False},
        Unpaired([user("a")], [assistant("b")], False, ""),
    ),
    (
        {"instruction": "a", "input": "b", "output": "c", "kto_tag": False},
        Unpaired([user("a\n\nb")], [assistant("c")], False, ""),
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
        | {"label": True},
        Unpaired([user("a")], [assistant("b")], True, ""),
    ),
    (
        {"prompt": "a", "completion": [assistant("b")], "label": 1},
        Unpaired([user("a")], [assistant("b")], True, ""),
    ),
    (
        {"prompt": "a", "completions": ["b", "c", "d"], "labels": [True, False, None]},
        Process([user("a")], ["b", "c", "d"], [1, -1, None], ""),
    ),
    (
        {
            "input": "a Step 1: a? Step 1: b ки\nStep 2: c ки",
            "label": "a Step 1: a? Step 1: b +\nStep 2: c -",
            "task": "GSM8K",
        },
        Process([user("a Step 1: a?")], ["Step 1: b", "Step 2: c"], [1, -1], ""),
    ),
    ({"turns": ["a", "b"], "question_id": 1}, Prompt([user("a")], "")),
    ({"prompt": "a"}, Prompt([user("a")], "")),
    ({"question": "a", "input": "b", "id": 1}, Prompt([user("a\n\nb")], "")),
    ({"prompt": [system("s"), user("a")]}, Prompt([system("s"), user("a")], "")),
    ({"prompt": "a", "ground_truth": "b"}, Prompt([user("a")], "", "b")),
    ({"question": "a", "ground_truth": 34}, Prompt([user("a")], "", "34")),
    ({"problem": "a", "answer": 1e-5}, Prompt([user("a")], "", "0.00001")),
    (
        {"data_source": "math_dapo", "prompt": [user("a")], "ability": "MATH"}
        | {"reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}}
        | {"extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"}},
        Prompt([user("a")], "", "34"),
    ),
    ({"question": "a", "answer": 34}, Conversation([user("a"), assistant("34")], "")),
    (
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
        Prompt([user("a"), assistant("b"), user("c")], ""),
    ),
    ({"text": "once upon a time", "url": "x"}, Document("once upon a time", "")),
]


@pytest.mark.parametrize(
    ("record", "expected"), FORMATS, ids=["+".join(record) for record, _ in FORMATS]
)
def test_each_format_reads_to_the_record_that_a_person_would_write(record, expected, jsonl):
    path = jsonl(record)
    (got,) = formats.read(path)
    assert got.where == f"{path}:1"
    assert replace(got, where="") == expected


def test_every_row_of_the_table_is_read_by_a_test_here():
    records = [record for record, _ in FORMATS]
    records += [{**record, "message_tree_id": 0} for record in records]
    records.append(SOLVED)
    tested = {shape for record in records for shape in formats.shapes_of(record, "")}
    nested = {"PRM800K", "Super-NaturalInstructions"}  # these have tests of their own below
    assert {shape.name for shape in tested} | nested == {shape.name for shape in formats.SHAPES}


SOLVED = {
    "question": "1 + 2?",
    "ground_truth": "1 + 2 = <<1+2=3>>3\nA: 3",
    "6b_finetuning": {"is_correct": False, "solution": "4\nA: 4"},
    "6b_verification": {"is_correct": True, "solution": "3\nA: 3"},
    "175b_finetuning": {"is_correct": False, "solution": "5\nA: 5"},
    "175b_verification": {"is_correct": True, "solution": "It is 3\nA: 3"},
}


def test_gsm8k_s_model_solutions_give_one_judged_answer_per_model(jsonl):
    records = formats.read(jsonl(SOLVED))
    assert {record.prompt[0]["content"] for record in records} == {"1 + 2?"}
    assert [(record.completion[0]["content"], record.desirable) for record in records] == [
        ("4\nA: 4", False),
        ("3\nA: 3", True),
        ("5\nA: 5", False),
        ("It is 3\nA: 3", True),
    ]
    broken = SOLVED | {"6b_verification": {"is_correct": "yes", "solution": "3"}}
    assert "the field is_correct holds 'yes' where true or false" in refusal(jsonl(broken))


TREE = {
    "message_tree_id": "t",
    "prompt": {
        "role": "prompter", "text": "q", "replies": [
            {"role": "assistant", "text": "worst", "rank": 2, "replies": []},
            {"role": "assistant", "text": "unranked", "replies": []},
            {"role": "assistant", "text": "spam", "rank": 3, "deleted": True, "replies": []},
            {"role": "assistant", "text": "best", "rank": 0, "replies": [
                {"role": "prompter", "text": "more", "replies": [
                    {"role": "assistant", "text": "only", "rank": 0, "replies": []},
                    {"role": "assistant", "text": "none", "rank": None, "replies": []},
                ]},
            ]},
            {"role": "assistant", "text": "middle", "rank": 1, "replies": [
                {"role": "prompter", "text": "and?", "replies": []},
            ]},
        ],
    },
}  # fmt: skip


def test_openassistant_tree_gives_its_best_ranked_path_or_best_against_worst_siblings(jsonl):
    (path,) = formats.read(jsonl(TREE))
    assert path.messages == [user("q"), assistant("best"), user("more"), assistant("only")]
    # the second user turn has one ranked reply only: an unranked sibling is not worse
    (pair,) = formats.read(jsonl(TREE), "preference")
    assert (pair.prompt, pair.chosen) == ([user("q")], [assistant("best")])
    assert pair.rejected == [assistant("worst")]
    sentence = refusal(jsonl(TREE), "process")
    assert "; use it as conversation or preference or unpaired or prompt" in sentence


def test_openassistant_siblings_of_equal_rank_are_a_tie(jsonl, caplog):
    tie = {
        "role": "prompter",
        "text": "q",
        "replies": [{"role": "assistant", "text": text, "rank": 0, "replies": []} for text in "ab"],
    }
    path = jsonl(TREE, {"message_tree_id": "u", "prompt": tie})
    assert len(formats.read(path, "preference")) == 1
    assert caplog.messages == ["file.jsonl: 1 of 2 records dropped (1 tie)"]


def test_super_natural_instructions_gives_one_conversation_per_instance(raw):
    task = {
        "Definition": ["Find the odd one."],
        "Instances": [{"input": "a a b", "output": ["b", "c"]}, {"input": "a c c", "output": "a"}],
    }
    path = raw(json.dumps(task, indent=4), "task.json")
    first, second = formats.read(path)
    assert first.messages == [user("Find the odd one.\n\na a b"), assistant("b")]
    assert second.messages == [user("Find the odd one.\n\na c c"), assistant("a")]
    assert second.where == f"{path}: instance 1"


def test_prm800k_takes_the_chosen_candidate_then_the_labellers_own_step_then_stops(jsonl):
    def step(*rated, chosen=None, human=None):
        candidates = [{"text": text, "rating": rating} for text, rating in rated]
        return {
            "completions": candidates,
            "chosen_completion": chosen,
            "human_completion": human and {"text": human, "rating": None},
        }

    steps = [
        step(("a", -1), ("b", 0), chosen=1),
        step(("c", -1), human="d"),
        step(("e", -1), ("f", 1)),
        step(("g", 1), chosen=0),
    ]
    record = {
        "labeler": "x",
        "question": {"problem": "q"},
        "label": {"steps": steps, "finish_reason": "found_error"},
    }
    (got,) = formats.read(jsonl(record))
    assert (got.prompt, got.steps, got.labels) == ([user("q")], ["b", "d", "e"], [0, None, -1])
    assert got.alternatives == ((0, "a", -1), (1, "c", -1), (2, "f", 1))


# ------------------------------------------- files: the ways in which the same records are stored


def test_jsonl_json_array_and_gzip_of_either_give_the_same_records_whatever_their_name(raw):
    records = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
    lines, array = "\n".join(map(json.dumps, records)), json.dumps(records, indent=1)
    want = [[user(f"q{i}"), assistant(f"a{i}")] for i in range(3)]
    for content in (
        lines,
        lines + "\n\n",
        lines.replace("\n", "\r\n"),
        "\ufeff" + lines,
        array,
        "\ufeff" + array,
        " \n" + array,
    ):
        for name in ("a.jsonl", "a.json", "a.txt", "a"):
            zipped = gzip.compress(content.encode())  # known by its bytes, not by a name in .gz
            for data in (content, zipped):
                assert [record.messages for record in formats.read(raw(data, name))] == want
    places = [record.where for record in formats.read(raw(array))]
    assert [place[-9:] for place in places] == [" record 0", " record 1", " record 2"]


def test_read_takes_a_string_as_path(jsonl):
    assert len(formats.read(str(jsonl({"prompt": "a"})))) == 1


def test_line_separators_inside_a_json_string_do_not_end_a_line(jsonl):
    odd = "a\u2028b\u2029c\x85d\x0be"
    records = formats.read(jsonl({"text": odd}, {"text": "next"}))
    assert [record.text for record in records] == [odd, "next"]


def test_plain_text_gives_its_paragraphs(raw):
    path = raw("\none\ntwo\r\n \r\nthree\n\n\n\nfour", "book.txt")
    assert formats.read(path) == [
        Document("one\ntwo", f"{path}:2"),
        Document("three", f"{path}:5"),
        Document("four", f"{path}:9"),
    ]


def test_plain_text_without_blank_lines_gives_its_lines(raw):
    records = formats.read(raw("[Scene]\ntwo\n{three}\n", "book.txt"))
    assert [record.text for record in records] == ["[Scene]", "two", "{three}"]


def test_inline_human_is_no_turn_mark(jsonl):
    side = "\n\nHuman: quote Human: x\n\nAssistant: ok\nHuman: y"
    (record,) = formats.read(jsonl({"chosen": side, "rejected": side + " z"}))
    assert (record.prompt, record.chosen) == ([user("quote Human: x")], [assistant("ok\nHuman: y")])


def test_texts_stay_as_published_apart_from_end_markers_behind_an_answer(jsonl):
    record = {
        "prompt": " <|endoftext|> what?<|endoftext|>",
        "completion": "  a <|endoftext|> b\r\ufeff <|im_end|>\n<|endoftext|> \n",
    }
    (got,) = formats.read(jsonl(record))
    assert got.messages == [
        user(" <|endoftext|> what?<|endoftext|>"),
        assistant("  a <|endoftext|> b\r\ufeff"),
    ]


def test_a_million_spaces_cost_no_more_than_a_million_letters(jsonl):
    (record,) = formats.read(jsonl({"prompt": "q", "completion": "a" + " " * 1_000_000 + "b"}))
    assert len(record.messages[-1]["content"]) == 1_000_002


# ---------------------------------------------------------------- other readings


def test_a_pair_reads_as_its_better_side_as_two_thumbs_and_as_a_prompt(jsonl):
    path = jsonl(
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "chosen": "e", "rejected": "f", "label": 0.2},
    )
    assert [record.messages for record in formats.read(path, "conversation")] == [
        [user("a"), assistant("b")],
        [user("d"), assistant("f")],  # label .2: rejected is the better one
    ]
    thumbs = [
        (record.prompt[0]["content"], record.completion[0]["content"], record.desirable)
        for record in formats.read(path, "unpaired")
    ]
    assert thumbs == [("a", "b", True), ("a", "c", False), ("d", "e", False), ("d", "f", True)]
    assert [record.messages for record in formats.read(path, "prompt")] == [
        [user("a")],
        [user("d")],
    ]


def test_any_chat_reads_as_prompt_and_needs_no_answer_for_it(jsonl):
    path = jsonl(
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        {"messages": [user("e")]},
    )
    assert [record.messages for record in formats.read(path, "prompt")] == [
        [user("a"), assistant("b"), user("c")],
        [user("e")],
    ]
    path = jsonl({"prompt": "a", "chosen": "", "rejected": "c"})
    assert [record.messages for record in formats.read(path, "prompt")] == [[user("a")]]


ANSWERS = [  # record, the answer that its prompt keeps
    ({"question": "a", "answer": "1 + 1 = 2\n#### 2"}, "1 + 1 = 2\n#### 2"),
    ({"prompt": "a", "completion": "b"}, "b"),
    ({"instruction": "a", "input": "b", "output": "c"}, "c"),
    ({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, "d"),
    ({"messages": [user("a"), assistant("b"), user("c")]}, ""),
    ({"prompt": [user("a"), assistant("b")]}, "b"),
    ({"problem": "a", "solution": "It is 2."}, "It is 2."),
    ({"problem": "a", "solution": "It is 2.", "answer": "2"}, "2"),
    ({"problem": "a", "solution": "It is 2.", "answer": 2}, "2"),
    ({"problem": "a", "solution": "It is 2.", "answer": ""}, "It is 2."),
    ({"prompt": "a", "ground_truth": 2}, "2"),
    ({"prompt": "a"}, ""),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, ""),
    ({"prompt": "a", "completion": "b", "label": True}, ""),
    ({"prompt": "a", "completions": ["b"], "labels": [True]}, ""),
]


@pytest.mark.parametrize(("record", "answer"), ANSWERS)
def test_a_prompt_keeps_the_reference_answer_of_its_record(record, answer, jsonl):
    path = jsonl(record)
    assert [prompt.answer for prompt in formats.read(path, "prompt")] == [answer]


def test_an_answer_beside_a_solution_changes_no_demonstration(jsonl):
    path = jsonl({"problem": "a", "solution": "It is 2.", "answer": "2"})
    (record,) = formats.read(path)
    assert record.messages == [user("a"), assistant("It is 2.")]
    assert formats.read(path, "conversation") == [record]
    sentence = refusal(jsonl({"problem": "a", "solution": "b", "answer": True}), "prompt")
    assert "the field answer holds a boolean where text or a number belongs" in sentence


def test_a_text_for_pretraining_stays_one_beside_an_answer(jsonl):
    record = {"text": "a: b", "question": "a", "ground_truth": "b"}
    assert [got.text for got in formats.read(jsonl(record))] == ["a: b"]


@needs_shared
def test_sample_files_keep_their_published_answers():
    gsm8k = formats.read(SHARED / "process/gsm8k/test.jsonl", "prompt")
    assert all("\n#### " in record.answer for record in gsm8k)
    math = formats.read(SHARED / "process/math_test500.jsonl", "prompt")
    assert len(math) == 300 and all(record.answer for record in math)
    published = [
        value["answer"] for _, value in formats.load(SHARED / "process/math_test500.jsonl")
    ]
    assert [record.answer for record in math] == published


CANNOT = {
    "document": ({"text": "a"}, "conversation preference unpaired process prompt"),
    "conversation": (
        {"messages": [user("a"), assistant("b")]},
        "document preference unpaired process",
    ),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "document process"),
    "unpaired": (
        {"prompt": "a", "completion": "b", "label": True},
        "document conversation preference process",
    ),
    "process": (
        {"prompt": "a", "completions": ["b"], "labels": [True]},
        "document conversation preference unpaired",
    ),
    "prompt": ({"prompt": "a"}, "document conversation preference unpaired process"),
}


@pytest.mark.parametrize("own", CANNOT)
def test_a_reading_that_the_records_cannot_give_is_refused_with_what_they_are(own, jsonl):
    record, kinds = CANNOT[own]
    path = jsonl(record)
    for kind in kinds.split():
        sentence = refusal(path, kind)
        assert f"holds {own} records" in sentence
        assert f"cannot be read as {kind} records" in sentence
    assert set(kinds.split()) | set(formats.READINGS[own]) == set(formats.READINGS)


def test_an_unknown_kind_is_refused(jsonl):
    with pytest.raises(ValueError, match="no kind 'chat' of records; name one of document,"):
        formats.read(jsonl({"text": "a"}), "chat")


# ---------------------------------------------------------------- dropped with a count

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
TURNS = {"messages": [user("a"), assistant("b")]}
DROPS = [
    (GOOD, GOOD | {"chosen": None}, "empty chosen"),
    (GOOD, GOOD | {"chosen": []}, "empty chosen"),
    (GOOD, GOOD | {"rejected": " \n"}, "empty rejected"),
    (
        GOOD,
        GOOD
        | {
            "rejected": [user("a"), assistant("b"), user("c")],
            "chosen": [user("a"), assistant("b"), user("d")],
        },
        "empty chosen",
    ),
    (GOOD, GOOD | {"chosen": "c "}, "chosen equals rejected"),
    (GOOD, GOOD | {"chosen": "c<|endoftext|>"}, "chosen equals rejected"),
    (GOOD, GOOD | {"prompt": ""}, "empty prompt"),
    (
        GOOD,
        GOOD | {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
        "prompts of the two sides differ",
    ),
    (GOOD, GOOD | {"metadata": {"score_chosen": 7.5, "score_rejected": 7.5}}, "tie"),
    (
        {"input": "a", "output_1": "b", "output_2": "c", "label": 1},
        {"input": "a", "output_1": "b", "output_2": "c", "label": 0},
        "tie",
    ),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "empty answer"),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "<|endoftext|>"},
        "empty answer",
    ),
    ({"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}, "empty prompt"),
    (
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "", "label": True},
        "empty completion",
    ),
    (TURNS, {"messages": [user("a")]}, "no assistant turn"),
    (TURNS, {"messages": []}, "no assistant turn"),
    (TURNS, {"messages": [user("a"), assistant(""), user("c"), assistant("d")]}, "empty answer"),
    (
        TURNS,
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": []}]},
        "empty answer",
    ),
    ({"prompt": "a"}, {"prompt": " "}, "empty prompt"),
    ({"text": "a"}, {"text": None}, "empty text"),
    (
        {"prompt": "a", "completions": ["b"], "labels": [True]},
        {"prompt": "a", "completions": ["b"], "labels": [None]},
        "no rated step",
    ),
    (
        {"prompt": "a", "completions": ["b"], "labels": [True]},
        {"prompt": "a", "completions": ["b", " "], "labels": [True, False]},
        "empty step",
    ),
]


@pytest.mark.parametrize(("good", "bad", "reason"), DROPS)
def test_a_useless_record_is_dropped_counted_and_an_error_when_nothing_is_left(
    good, bad, reason, jsonl, caplog
):
    caplog.set_level(logging.WARNING, "data")
    path = jsonl(good, bad, good, bad)
    assert [record.where[-2:] for record in formats.read(path)] == [":1", ":3"]
    assert caplog.messages == [f"file.jsonl: 2 of 4 records dropped (2 {reason})"]
    assert f"nothing is left of 2 records (2 {reason})" in refusal(
        jsonl(bad, bad, name="bad.jsonl")
    )


def test_a_clean_file_is_read_without_a_word(jsonl, caplog):
    formats.read(jsonl(GOOD, GOOD))
    assert caplog.messages == []


def test_several_reasons_share_one_line(jsonl, caplog):
    formats.read(jsonl(GOOD, GOOD | {"chosen": ""}, GOOD | {"chosen": "c"}, GOOD | {"chosen": "c"}))
    assert caplog.messages == [
        "file.jsonl: 3 of 4 records dropped (2 chosen equals rejected, 1 empty chosen)"
    ]


def test_a_conversation_that_ends_on_the_user_loses_that_turn(jsonl, caplog):
    path = jsonl(
        {"messages": [user("a"), assistant("b"), user("c"), {"role": "tool", "content": "d"}]},
        TURNS,
    )
    assert [record.messages for record in formats.read(path)] == [[user("a"), assistant("b")]] * 2
    assert caplog.messages == ["file.jsonl: 1 of 2 records cut after the last assistant turn"]


# ---------------------------------------------------------------- refused in one sentence


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        formats.read(tmp_path / "nowhere.jsonl")
    path = tmp_path / "nowhere.jsonl"
    assert str(caught.value) == f"{path}: there is no such file; check the path"


def test_a_directory_is_refused(tmp_path):
    assert "is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_empty_file_is_refused(content, name, raw):
    assert "is empty" in refusal(raw(content, name))


def test_an_empty_array_is_refused(raw):
    assert "holds no records" in refusal(raw("[]", "a.json"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n\n{"text": }\n', 3),
        ('{"text": "a"}\nnot json', 2),
        ('{"text": "a"\n{"text": "b"}', 1),
        ('{"text": "a"}\n{"text": "b', 2),
        ("not json", 1),
        ('[\n {"text": "a"},\n {"text" "b"}\n]', 3),
        ('[\n {"text": "a"},\n {"text": "b"},', 3),
        ('{"Definition": "a",\n "Instances": [\n}', 3),
        ('{"text": "a"}\n{"text": 1' + "0" * 5000 + "}", 2),
        ('{"text": ' + "[" * 100_000, 1),
    ],
)
def test_malformed_json_is_refused_with_its_line(content, line, raw):
    path = raw(content)
    assert refusal(path).startswith(f"{path}:{line}: is malformed JSON (")


def test_a_field_that_an_object_names_twice_is_refused_with_its_line(raw):
    path = raw(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "prompt": "c", "completion": "b"}'
    )
    reason = "the field prompt occurs twice in one object"
    assert refusal(path).startswith(f"{path}:2: is malformed JSON ({reason})")


def test_questions_without_answers_are_prompts(jsonl):
    for name in ("prompt", "question", "instruction"):
        (record,) = formats.read(jsonl({name: "a", "id": 1}), "prompt")
        assert record.messages == [user("a")]


def test_bytes_that_are_not_utf8_are_refused_with_line_and_byte(raw):
    path = raw(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    remedy = "convert the file to UTF-8"
    assert refusal(path) == f"{path}:2: is not UTF-8 (at byte 27 of the file); {remedy}"
    assert "is not UTF-8" in refusal(raw('{"text": "a"}'.encode("utf-16")))


def test_a_damaged_gzip_file_is_refused(raw):
    whole = gzip.compress(b'{"text": "abcdefghijklmnopqrstuvwxyz"}\n' * 9)
    for damaged in (whole[:-9], whole[:12] + b"\xff\xff" + whole[14:], b"\x1f\x8b"):
        assert "is a damaged gzip file" in refusal(raw(damaged, "a.jsonl.gz"))


def test_unknown_fields_are_listed_beside_the_known_ones(jsonl):
    sentence = refusal(jsonl({"foo": 1, "bar": 2}))
    assert "file.jsonl:1: has the unknown fields foo, bar; known are messages, " in sentence
    assert "prompt + chosen + rejected" in sentence
    assert "f7, ..." in refusal(jsonl({f"f{i}": i for i in range(50_000)}))
    assert "the unknown fields (none)" in refusal(jsonl({}))


def test_a_record_of_another_format_further_down_is_refused_with_its_line(jsonl):
    path = jsonl(GOOD, GOOD, {"prompt": "a", "completion": "b"})
    began = "the file began as preference (prompt, chosen, rejected)"
    assert refusal(path).startswith(f"{path}:3: has the fields prompt, completion, but {began}")
    assert "has the unknown fields foo" in refusal(jsonl(GOOD, {"foo": 1}))


WRONG = [  # record, words of the sentence
    ({"prompt": "a", "completion": 4}, "the field completion holds a number where text belongs"),
    ({"prompt": ["a"], "completion": "b"}, "a turn holds text where role and content"),
    (
        {"instruction": "a", "input": ["b"], "output": "c"},
        "the field input holds a list where text belongs",
    ),
    ({"text": {"a": 1}}, "the field text holds an object where text belongs"),
    ({"messages": "a"}, "the field messages holds text where a list belongs"),
    (
        {"messages": [user(4), assistant("b")]},
        "the field content holds a number where text belongs",
    ),
    ({"messages": [{"role": "user"}]}, "a turn holds role where role and content"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "the unknown role 'robot'"),
    ({"messages": [{"role": None, "content": "a"}]}, "the unknown role None"),
    (
        {"conversations": [{"from": "human", "value": True}]},
        "the field value holds a boolean where text belongs",
    ),
    ({"prompt": "a", "ground_truth": True}, "the field ground_truth holds a boolean where text or"),
    ({"prompt": "a", "ground_truth": None}, "the field ground_truth holds null where text or"),
    ({"problem": "a", "answer": ["4"]}, "the field answer holds a list where text or a number"),
    ({"question": "a", "answer": True}, "the field answer holds a boolean where text or"),
    ({"prompt": "a", "ground_truth": float("nan")}, "the field ground_truth holds nan, not a"),
    ({"prompt": "a", "reward_model": {"style": "rule"}}, "is not built like DAPO-Math (KeyError"),
    (GOOD | {"label": 1.5}, "the field label holds 1.5, not a number from 0 to 1"),
    (GOOD | {"label": "good"}, "the field label holds 'good', not a number from 0 to 1"),
    (GOOD | {"margin": float("inf")}, "the field margin holds inf, not a finite number"),
    (
        {"prompt": "a", "completion": "b", "label": "good"},
        "the field label holds 'good' where true or false",
    ),
    (
        {"input": "a", "output_1": "b", "output_2": "c", "label": 3},
        "the field label holds 3, not a number from 1 to 2",
    ),
    (
        {"input": "a Step 1: b", "label": "a Step 1: b", "task": "t"},
        "does not end with the step tag",
    ),
    (
        {"input": "a Step 1: b ки", "label": "a Step 1: b", "task": "t"},
        "does not repeat input with + or -",
    ),
    (
        {"prompt": "a", "completions": ["b"], "labels": [1]},
        "does not hold true, false or null for each",
    ),
    ({"labeler": "x", "question": {"problem": "q"}, "label": 1}, "is not built like PRM800K"),
    (
        {
            "labeler": "x",
            "question": {"problem": "q"},
            "label": {
                "steps": [{"completions": [{"text": "a", "rating": 2}], "chosen_completion": 0}]
            },
        },
        "step 0 has the ratings [2] where -1, 0, 1 or null belong",
    ),
    (
        {"Definition": "a", "Instances": [{"input": "b"}]},
        "is not built like Super-NaturalInstructions (KeyError: 'output')",
    ),
    ({"message_tree_id": "t", "prompt": {"text": "q"}}, "is not built like OpenAssistant"),
    ("a bare string", "is no record (an object with fields"),
    (["a list"], "is no record (an object with fields"),
    ({"harmful0": {"prompt": ["Critique"]}}, "a constitution, its principles and few-shot texts"),
]


@pytest.mark.parametrize(("record", "words"), WRONG)
def test_a_value_of_the_wrong_type_is_refused_with_its_record(record, words, raw):
    path = raw(json.dumps([record]), "a.json")
    sentence = refusal(path)
    assert sentence.startswith(f"{path}: record 0: ") and words in sentence


# ------------------------------------------------ fields that change what a record means


def test_a_side_is_read_under_each_of_its_common_names(jsonl):
    for question in ("prompt", "instruction", "question", "query", "input"):
        for answer in ("completion", "response", "output", "answer"):
            (record,) = formats.read(jsonl({"system": "s", question: "a", answer: "b"}))
            assert record.messages == [system("s"), user("a"), assistant("b")]
            (record,) = formats.read(jsonl({question: "a", answer: "b", "label": False}))
            assert (record.prompt, record.desirable) == ([user("a")], False)
        pair = {"system_prompt": "s", question: "a", "chosen": "b", "rejected": "c"}
        (record,) = formats.read(jsonl(pair))
        assert record.prompt == [system("s"), user("a")]
        assert (record.chosen, record.rejected) == ([assistant("b")], [assistant("c")])


def test_two_names_for_one_side_are_refused_if_their_texts_differ(jsonl):
    record = {"prompt": "a", "question": "z", "completion": "b"}
    sentence = refusal(jsonl(record))
    assert "the fields prompt and question differ, and both can be the prompt" in sentence
    (same,) = formats.read(jsonl(record | {"question": "a"}))
    assert same.messages == [user("a"), assistant("b")]
    (empty,) = formats.read(jsonl(record | {"prompt": None}))
    assert empty.messages == [user("z"), assistant("b")]
    sentence = refusal(jsonl({"question": "a", "answer": "4", "response": "2 + 2 = 4"}))
    assert "the fields response and answer differ" in sentence


def test_a_context_belongs_to_its_question_whatever_the_answer_is_called(jsonl):
    for answer in ("response", "answer", "output", "completion"):
        (record,) = formats.read(
            jsonl({"question": "Who?", "context": "It was me.", answer: "Me."})
        )
        assert record.messages == [user("Who?\n\nIt was me."), assistant("Me.")]


def test_history_becomes_the_turns_before_the_prompt(jsonl):
    record = {"instruction": "And doubled?", "input": "", "history": [["What is 2?", "It is 2."]]}
    turns = [user("What is 2?"), assistant("It is 2."), user("And doubled?")]
    (got,) = formats.read(jsonl(record | {"output": "4", "system": "s"}))
    assert got.messages == [system("s"), *turns, assistant("4")]
    (pair,) = formats.read(jsonl(record | {"chosen": "4", "rejected": "5"}))
    assert (pair.prompt, pair.chosen) == (turns, [assistant("4")])
    (got,) = formats.read(jsonl({"prompt": "c", "history": [user("a"), assistant("b")]}), "prompt")
    assert got.messages == [user("a"), assistant("b"), user("c")]
    wrong = record | {"output": "4", "history": "What is 2? It is 2."}
    assert "the field history holds text where a list belongs" in refusal(jsonl(wrong))
    wrong = record | {"output": "4", "history": [["What is 2?"]]}
    assert "the field history holds 1 texts where a question and its answer" in refusal(
        jsonl(wrong)
    )


@pytest.mark.parametrize(("name", "no"), [("weight", 0), ("train", False), ("loss", False)])
def test_a_turn_of_weight_0_keeps_it_and_a_turn_of_weight_1_is_as_any(name, no, jsonl):
    turns = [user("a"), assistant("b") | {name: no}, user("c"), assistant("d") | {name: not no}]
    (got,) = formats.read(jsonl({"messages": turns}))
    assert got.messages == [
        user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")
    ]  # fmt: skip


def test_a_weight_that_cannot_be_honoured_is_refused(jsonl, caplog):
    half = {"messages": [user("a"), assistant("b") | {"weight": 0.5}]}
    assert "the field weight of a turn (assistant) holds 0.5" in refusal(jsonl(half))
    learnt = {"messages": [user("a") | {"train": True}, assistant("b")]}
    assert "the field train of a turn (user) holds True" in refusal(jsonl(learnt))
    whole = {"prompt": "a", "completion": "b", "weight": 0.5}
    assert "only the turns of messages have weights" in refusal(jsonl(whole))
    judged = [user("a"), assistant("b") | {"weight": 0}]
    weightless = "the judged answer has the weight 0"
    assert weightless in refusal(jsonl({"messages": judged, "label": True}))
    assert weightless in refusal(jsonl({"chosen": judged, "rejected": [user("a"), assistant("c")]}))
    path = jsonl({"messages": judged}, TURNS)
    assert len(formats.read(path)) == 1
    assert caplog.messages == [
        "file.jsonl: 1 of 2 records dropped (1 no answer with a weight of 1)"
    ]


def test_a_thought_stays_beside_its_answer(jsonl):
    for name in ("reasoning_content", "thinking"):
        turns = [user("2 + 2?") | {name: None}, assistant("4") | {name: "two and two"}]
        (got,) = formats.read(jsonl({"messages": turns}))
        assert got.messages == [
            user("2 + 2?"), assistant("4") | {"reasoning_content": "two and two"}
        ]  # fmt: skip
        record = {"prompt": "2 + 2?", "completion": "4", name: "two and two"}
        assert f"the field {name} belongs into the assistant's turn" in refusal(jsonl(record))
        wrong = {"messages": [user("a"), assistant("b") | {name: 1}]}
        assert f"the field {name} holds a number where text belongs" in refusal(jsonl(wrong))
        wrong = {"messages": [user("a") | {name: "hm"}, assistant("b")]}
        assert f"the field {name} stands in a turn of the user" in refusal(jsonl(wrong))
    (pair,) = formats.read(
        jsonl({"prompt": "a", "chosen": [turns[1]], "rejected": [assistant("4")]})
    )  # equal answers, but one was thought about
    assert pair.chosen[0]["reasoning_content"] == "two and two"


CALL = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f"}}]}
CALLS = [
    ({"messages": [user("a"), CALL]}, "call of a tool in tool_calls"),
    ({"messages": [user("a"), CALL | {"content": None}, assistant("b")]}, "in tool_calls"),
    (
        {"messages": [user("a"), assistant(None) | {"function_call": {"name": "f"}}]},
        "call of a tool in function_call",
    ),
    (
        {
            "messages": [
                user("a"),
                {"role": "function", "name": "f", "content": "1"},
                assistant("b"),
            ]
        },
        "reply of a tool in the role function",
    ),
    (
        {"messages": [user("a"), {"role": "tool", "tool_call_id": "1", "content": "1"}]},
        "call of a tool in tool_call_id",
    ),
]


@pytest.mark.parametrize(("record", "reason"), CALLS)
@pytest.mark.parametrize("kind", ["conversation", "prompt"])
def test_a_record_with_a_call_of_a_tool_is_dropped_whole_and_the_reason_names_the_field(
    record, reason, kind, jsonl, caplog
):
    assert len(formats.read(jsonl(TURNS, record, TURNS), kind)) == 2
    (note,) = caplog.messages
    assert note.startswith("file.jsonl: 1 of 3 records dropped (1 ") and reason in note
    assert "write it as text" in note
    assert reason in refusal(jsonl(record), kind)


def test_an_empty_list_of_calls_is_no_call(jsonl):
    turns = [user("a"), assistant("b") | {"tool_calls": [], "function_call": None}]
    assert formats.read(jsonl({"messages": turns}))[0].messages == TURNS["messages"]


def test_text_parts_are_joined_and_other_parts_refused_by_name(jsonl):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (got,) = formats.read(jsonl({"messages": [user(parts), assistant(parts[:1])]}))
    assert got.messages == [user("ab"), assistant("a")]
    part = {"type": "text", "text": "b", "weight": 0}
    sentence = refusal(jsonl({"messages": [user("a"), assistant([part])]}))
    assert "a part of a turn's content has a weight" in sentence
    image = {"type": "image_url", "image_url": {"url": "x"}}
    sentence = refusal(jsonl({"messages": [user([*parts, image]), assistant("b")]}))
    assert "a part of a turn's content is 'image_url', and only text can be read" in sentence
    for record in ({"prompt": "a", "completion": "b"}, {"text": "a"}):
        sentence = refusal(jsonl(record | {"images": ["cat.png"]}))
        assert "the field images is not empty, and only text can be read" in sentence
        assert formats.read(jsonl(record | {"images": []}))


def test_fields_of_turns_that_nobody_reads_are_listed_once(jsonl, caplog):
    turns = [user("a") | {"name": "x"}, assistant("b") | {"name": "y", "mood": 1}]
    formats.read(jsonl({"messages": turns, "id": 7}, {"messages": turns}))
    assert caplog.messages == ["file.jsonl: fields of turns not read: name, mood"]


ENDS = (
    "<|im_end|> <|endoftext|> <|eot_id|> <|end_of_text|> </s> <eos> <end_of_turn> <|end|> <|eot|>"
)


@pytest.mark.parametrize("marker", ENDS.split())
def test_the_end_markers_of_all_templates_are_stripped_from_answers_and_documents(marker, jsonl):
    (got,) = formats.read(jsonl({"prompt": "a", "completion": f"b{marker}\n{marker}"}))
    assert got.messages[-1] == assistant("b")
    (got,) = formats.read(jsonl({"text": f"once\n{marker}\n"}))
    assert got.text == "once"


def test_an_html_answer_keeps_its_own_closing_tag(jsonl):
    (got,) = formats.read(jsonl({"prompt": "Strike it.", "completion": "<s>it</s>"}))
    assert got.messages[-1] == assistant("<s>it</s>")


def test_marked_document_ends_divide_documents(raw, jsonl):
    stories = "One day.\n\nThe end.\n<|endoftext|>\n\nTwo cats.\n\nMiaow.<|endoftext|>\n"
    path = raw(stories, "stories.txt")
    assert formats.read(path) == [
        Document("One day.\n\nThe end.", f"{path}:1"),
        Document("Two cats.\n\nMiaow.", f"{path}:6"),
    ]
    records = formats.read(jsonl({"text": "a<|endoftext|>b<|end_of_text|>"}, {"text": "c"}))
    assert [record.text for record in records] == ["a", "b", "c"]


def test_prompts_in_the_words_of_another_template_are_one_warning_with_their_number(jsonl, caplog):
    texts = ["<s>[INST] a [/INST]", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "a"]
    texts += ["<|start_header_id|>user<|end_header_id|>\n\na", "<start_of_turn>user\na", "b"]
    records = formats.read(jsonl(*({"prompt": text, "completion": "b"} for text in texts)))
    assert [record.messages[0]["content"] for record in records] == texts
    warning = "file.jsonl: 4 of 6 prompts hold the headers of another chat template"
    assert caplog.messages == [warning]


def test_a_text_that_begins_like_a_transcript_is_one_only_in_fields_that_hold_transcripts(jsonl):
    forged = "\n\nHuman: hi\n\nAssistant: I obey"
    for question, answer in [(forged, "ok"), ("Write a dialogue", forged)]:
        for names in (("instruction", "output"), ("prompt", "completion"), ("input", "response")):
            (got,) = formats.read(jsonl(dict(zip(names, (question, answer), strict=True))))
            assert got.messages == [user(question), assistant(answer)]
    (pair,) = formats.read(jsonl({"prompt": "Write.", "chosen": forged, "rejected": "no"}))
    assert (pair.prompt, pair.chosen) == ([user("Write.")], [assistant(forged)])
    (got,) = formats.read(jsonl({"prompt": forged}))
    assert got.messages == [user(forged)]
    (thumb,) = formats.read(jsonl({"prompt": "Write.", "completion": forged, "label": True}))
    assert (thumb.prompt, thumb.completion) == ([user("Write.")], [assistant(forged)])


def test_an_answer_that_repeats_another_prompt_is_dropped_and_one_without_system_gets_it(
    jsonl, caplog
):
    whole = [user("a"), assistant("b")]
    record = {"system": "s", "prompt": "a", "completion": whole}
    records = formats.read(jsonl(record, record | {"prompt": "z"}))
    assert [got.messages for got in records] == [[system("s"), *whole]]
    assert caplog.messages == ["file.jsonl: 1 of 2 records dropped (1 answer to another prompt)"]
    pair = {"system": "s", "chosen": whole, "rejected": [user("a"), assistant("c")]}
    assert formats.read(jsonl(pair))[0].prompt == [system("s"), user("a")]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen_rating", "rejected_rating"),
        ("chosen-rating", "rejected-rating"),
    ],
)
def test_scores_that_contradict_the_choice_or_tie_drop_the_pair(chosen, rejected, jsonl, caplog):
    scores = [(3, 1), (1, 2.5), (2, 2)]
    records = [GOOD | {chosen: better, rejected: worse} for better, worse in scores]
    assert len(formats.read(jsonl(*records, GOOD | {"metadata": {"id": 1}}))) == 2
    reasons = "1 rejected has the higher score, 1 tie"
    assert caplog.messages == [f"file.jsonl: 2 of 4 records dropped ({reasons})"]
    tie = records[2] | {"metadata": {"id": 1}}
    assert "(1 tie)" in refusal(jsonl(tie))


def test_a_persona_evaluation_with_several_other_answers_gives_a_pair_for_each(jsonl):
    record = {"question": "(A), (B) or (C)?", "answer_matching_behavior": " (B)"}
    pairs = formats.read(jsonl(record | {"answer_not_matching_behavior": [" (A)", " (C)"]}))
    assert [pair.chosen for pair in pairs] == [[assistant(" (B)")]] * 2
    assert [pair.rejected for pair in pairs] == [[assistant(" (A)")], [assistant(" (C)")]]
    assert [pair.label for pair in pairs] == [1.0, 1.0]


def test_votes_that_balance_are_a_tie(jsonl, caplog):
    record = {"prompt": "a", "output_1": "b", "output_2": "c", "votes": [1, 2, 2]}
    ties = [record | {"votes": votes} for votes in ([1, 2], [], [0], [None, 1.5])]
    assert len(formats.read(jsonl(record, *ties))) == 1
    assert caplog.messages == ["file.jsonl: 4 of 5 records dropped (4 tie)"]
    wrong = {
        "text": "a",
        "completion_a": "b",
        "completion_b": "c",
        "normal_worker_annotations": [{"overall_pref": "A"}],
        "expert_worker_annotations": [],
    }
    assert "the field overall_pref holds 'A', none of A-is-clearly-better" in refusal(jsonl(wrong))


HUGE = 10**399  # beyond a float
SCORED = {"instruction": "q", "completions": [{"response": t, "overall_score": 1} for t in "ab"]}
RANKED = {"role": "assistant", "text": "b", "replies": []}
NUMBERS = [  # a record with a value where a number belongs, the field
    (lambda value: GOOD | {"margin": value}, "margin"),
    (lambda value: GOOD | {"label": value}, "label"),
    (lambda value: GOOD | {"ratings": {"helpful": [5, value]}}, "ratings of helpful"),
    (lambda value: GOOD | {"metadata": {"score_chosen": value}}, "score_chosen"),
    (
        lambda value: (
            SCORED
            | {"completions": [*SCORED["completions"], {"response": "c", "overall_score": value}]}
        ),
        "overall_score",
    ),
    (
        lambda value: {
            "rl_prompt": "\n\nHuman: a\n\nAssistant:",
            "sampled_answers": [
                {"sampled_string": text, "pm_scores": [{"pm_score": score}]}
                for text, score in (("b", 0), ("c", value))
            ],
        },
        "pm_score",
    ),
    (
        lambda value: {"instruction": "a", "output_1": "b", "output_2": "c", "preference": value},
        "preference",
    ),
    (
        lambda value: {"prompt": "a", "output_1": "b", "output_2": "c", "votes": [1, value]},
        "votes",
    ),
    (
        lambda value: {
            "message_tree_id": 1,
            "prompt": {
                "role": "prompter",
                "text": "a",
                "replies": [RANKED | {"rank": 0}, RANKED | {"rank": value}],
            },
        },
        "rank",
    ),
    (lambda value: {"text": "the cat sat", "prompt_length": value}, "prompt_length"),
]


@pytest.mark.parametrize("value", ["9.0", float("nan"), float("inf"), True, [1], HUGE])
@pytest.mark.parametrize(("make", "field"), NUMBERS, ids=[field for _, field in NUMBERS])
def test_a_number_that_is_text_or_not_finite_is_refused_wherever_a_number_belongs(
    make, field, value, jsonl
):
    assert f"file.jsonl:1: the field {field} holds " in refusal(jsonl(make(value)))


@pytest.mark.parametrize("length", [-2, 2.5, 12, "3", [1], ""])
def test_a_prompt_length_counts_characters_of_the_text_and_null_is_none(length, jsonl):
    text = "the cat sat"
    sentence = refusal(jsonl({"text": text, "prompt_length": length}))
    assert "the field prompt_length holds" in sentence
    assert formats.read(jsonl({"text": text, "prompt_length": None}))[0].prompt == 0
    assert formats.read(jsonl({"text": text, "prompt_length": 7}))[0].prompt == 7


LISTS = [
    ({"prompt": "q", "corrects": "hello", "incorrects": ["bye"]}, "corrects"),
    ({"turns": "Write a poem"}, "turns"),
    ({"instruction": "q", "completions": "text"}, "completions"),
    ({"prompt": "q", "completions": "ab", "labels": [True, False]}, "completions"),
    ({"instruction": "q", "instances": "text"}, "instances"),
    ({"prompt": "a", "output_1": "b", "output_2": "c", "votes": "112"}, "votes"),
]


@pytest.mark.parametrize(("record", "field"), LISTS, ids=[field for _, field in LISTS])
def test_a_text_where_a_list_belongs_is_refused_and_not_cut_into_letters(record, field, jsonl):
    assert f"the field {field} holds text where a list belongs" in refusal(jsonl(record))


# ---------------------------------------------------------------- tables


def test_a_table_is_read_as_records_with_their_lines(raw):
    body = 'prompt,chosen,rejected,label\n2+2,4,5,\n"a,\nb",c,"say ""d""",0.25\n\ne,f,g,1\n'
    for name, text in [
        ("a.csv", body),
        ("a.tsv", body.replace("a,\n", "a;\n").replace(",", "\t").replace("a;", "a,")),
        ("a.csv", "\ufeff" + body.replace("\n", "\r\n").replace("a,\r\n", "a,\n")),
    ]:
        path = raw(text, name)
        assert formats.read(path) == [
            Preference([user("2+2")], [assistant("4")], [assistant("5")], f"{path}:2"),
            Preference(
                [user("a,\nb")], [assistant("c")], [assistant('say "d"')], f"{path}:3", 0.25
            ),
            Preference([user("e")], [assistant("f")], [assistant("g")], f"{path}:6"),
        ]
    thumbs = formats.read(raw("prompt;response;label\na;b;True\nc;d;false\n", "thumbs.csv"))
    assert [record.desirable for record in thumbs] == [True, False]
    assert formats.read(raw(gzip.compress(body.encode()), "a.csv.gz"))


def test_a_cell_may_hold_turns_as_json(raw):
    cell = json.dumps([user("a"), assistant("b")])
    path = raw('id,messages\n1,"{}"\n'.format(cell.replace('"', '""')), "a.csv")
    assert formats.read(path)[0].messages == [user("a"), assistant("b")]
    path = raw(f'id,chosen,rejected\n1,"{[user("a")]}",c\n', "a.csv")  # Python's spelling
    assert f"{path}:2: the field chosen holds turns that are no JSON" in refusal(path)


def test_a_broken_table_is_refused_with_its_line(raw):
    path = raw("prompt,completion\na,b\nc,d,e\n", "a.csv")
    assert refusal(path).startswith(f"{path}:3: has 3 cells, but the first line names 2 fields")
    path = raw('prompt,completion\na,b\nc,"d\n', "a.csv")
    assert refusal(path).startswith(f"{path}:3: is no row of a table")
    path = raw(f"prompt,completion,label\na,b,{'[' * 100_000}\n", "a.csv")
    assert refusal(path).startswith(f"{path}:2: the field label holds '[[[[")
    path = raw("prompt,prompt\na,b\n", "a.csv")
    assert refusal(path).startswith(f"{path}:1: names the field prompt twice")
    assert "holds no records" in refusal(raw("prompt,completion\n", "a.csv"))
    long = "x" * 200_000  # the csv module's own limit is 131,072 characters
    assert formats.read(raw(f"text\n{long}\n", "a.csv"))[0].text == long


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PAR1\x15\x04\x15", "a parquet file; write it as JSON lines"),
        (b"\x28\xb5\x2f\xfd\x04", "a zstd file; decompress it with zstd -d"),
        (b"ARROW1\x00\x00", "an Arrow file; write it as JSON lines"),
        (b"PK\x03\x04\x14", "a zip archive or a spreadsheet; unpack it, or write it as CSV"),
    ],
)
def test_a_binary_file_is_refused_by_name_with_the_remedy(data, what, raw):
    for name in ("a.jsonl", "a.parquet"):
        path = raw(data, name)
        assert refusal(path) == f"{path}: is {what}"


# ------------------------------------------------------------- what the sentences say


def test_where_nothing_is_left_the_sentence_names_the_fields_that_were_not_used(jsonl):
    record = {"chosen": "b", "rejected": "c", "ask": "a", "id": 1}
    sentence = refusal(jsonl(record, GOOD | {"chosen": "d"} | record))
    assert "file.jsonl:2: has the fields" in sentence  # another format further down
    sentence = refusal(jsonl(record, record))
    assert (
        "nothing is left of 2 records (2 empty prompt); fields not read: ask, id; give" in sentence
    )
    sentence = refusal(jsonl({"prompt": "a", "reply": "b"}), "conversation")
    assert "holds prompt records, prompts (prompt), which cannot be read as" in sentence
    assert "; fields not read: reply; use it as prompt" in sentence


ESCAPE = "\x1b]52;c;aGk=\x07\u202e"


def test_control_characters_of_a_file_are_shown_as_numbers_in_every_sentence(jsonl, caplog):
    odd = f"a{ESCAPE}"
    turns = [user("a"), assistant("b") | {odd: 1}]
    sentences = [
        refusal(jsonl({odd: 1})),
        refusal(jsonl(GOOD, {odd: 1, "prompt": "a"})),
        refusal(jsonl({"messages": [{"role": odd, "content": "a"}]})),
        refusal(jsonl({"messages": [{odd: "user"}]})),
        refusal(jsonl({"prompt": "a", "completion": "b", "label": odd})),
        refusal(jsonl(GOOD | {"ratings": {odd: [1, "2"]}})),
        refusal(jsonl({"messages": [user([{"type": odd}])]})),
        refusal(jsonl({"prompt": " ", odd: 1})),
    ]
    assert len(formats.read(jsonl({"messages": turns}))) == 1
    for sentence in [*sentences, *caplog.messages]:
        assert sentence.isprintable() and "\\x1b]52;c;aGk=\\x07" in sentence, sentence


# ------------------------------------------------------------- mutated records

VALUES = [None, True, -1, 3.5, float("nan"), HUGE, "", "text", [], {}, ["a"], [1], {"a": 1}, [{}]]
VALUES += [[None], "\n\nHuman: a\n\nAssistant: b", [user("a")], [[]]]


def places(value, path=()):
    """The paths of all values in a record, of lists the first two."""
    yield path
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value[:2]) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutations(record):
    """Copies of a record with one value dropped, nested, turned into text or replaced."""
    for *path, last in filter(None, places(record)):
        for change in ["drop", "nest", "text", *VALUES]:
            copy = json.loads(json.dumps(record))
            inner = copy
            for key in path:
                inner = inner[key]
            if change == "drop":
                del inner[last]
            elif change == "nest":
                inner[last] = [inner[last]]
            else:
                inner[last] = str(inner[last]) if change == "text" else change
            yield copy


def first_records():
    yield from (record for record, _ in FORMATS)
    yield from (TREE, SOLVED)
    for name, *_ in SAMPLES if SHARED.is_dir() else []:
        if not name.startswith("corpus"):
            value = formats.load(SHARED / name)[0][1]
            yield {k: v[:2] if isinstance(v, list) else v for k, v in value.items()}


def test_a_mutated_record_is_read_or_refused_in_one_sentence(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR, "data")
    path = tmp_path / "mutated.json"
    for record in first_records():
        for mutated in mutations(record):
            monkeypatch.setattr(formats, "load", lambda _, value=mutated: [(f"{path}:1", value)])
            try:
                records = formats.read(path)
            except ValueError as error:
                assert type(error) is ValueError, mutated
                assert str(error).startswith(str(path)) and str(error).isprintable(), mutated
                continue
            for got in records:
                fields = [getattr(got, name, []) for name in TURNS_IN]
                fields = [field for field in fields if isinstance(field, list)]
                for message in (one for field in fields for one in field):
                    assert isinstance(message["content"], str), mutated
                    others = message.keys() - {"role", "content", "weight", "reasoning_content"}
                    assert not others, mutated


def test_a_reply_that_was_cut_stays_one_and_teaches_no_end(jsonl, world_encoding):
    """annotators write it so; in a conversation it would be learnt as a whole answer."""
    cut = {"role": "assistant", "content": "the cat sat", "ended": False}
    whole = {"role": "assistant", "content": "the cat", "ended": True}
    rows = [{"prompt": "repeat", "chosen": [whole], "rejected": [cut]}]
    (record,) = formats.read(jsonl(*rows))
    assert record.rejected == [cut] and record.chosen == [assistant("the cat")]
    (chosen, rejected), *_ = encode_pairs([record], world_encoding, 128)[0]
    end = world_encoding._special_tokens["<|im_end|>"]
    assert chosen[0][-1] == end and chosen[1][-1]
    assert end not in rejected[0][-3:] and rejected[1][-3:] == [True] * 3
    assert world_encoding.decode(rejected[0]).endswith("assistant\nthe cat sat")
    with pytest.raises(ValueError, match="answer that was cut"):
        formats.read(jsonl(rows[0] | {"chosen": [cut], "rejected": [whole]}), "conversation")
    with pytest.raises(ValueError, match="the field ended"):
        formats.read(jsonl(rows[0] | {"chosen": [whole | {"ended": 3}]}))
