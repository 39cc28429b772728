"""What is learned are exactly the answers and their end tokens, in every chat template.

Through the whole path: conversation with media → batch of the data set → labels as the loss sees
them, decoded.
"""

from __future__ import annotations

import copy

import pytest
import torch
from golden_data import golden
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny
from training_data import dataset_of
from transformers import PreTrainedTokenizerFast

from av_llava.chat import TEMPLATES, MediaPart, Message, TextPart
from av_llava.demo_model import tiny_tokenizer
from av_llava.processor import AVLlavaProcessor
from av_llava.settings import IGNORE_INDEX
from av_llava.training.samples import Sample

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system text here') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Turns whose words also occur in headers, end tokens inside texts, several bytes a letter.
TEXT = st.text(alphabet="aé多 .:\n!#?AUSER", min_size=1, max_size=12).map(str.strip).filter(bool)
ANSWER = st.one_of(
    TEXT,
    st.sampled_from(
        ["ASSISTANT:", "USER: no", "</s>", "<|im_end|>", "###", "user\nassistant", "!"]
    ),
)
PICTURE = Image.new("RGB", (20, 20), (9, 9, 9))


def conversation(questions, answers):
    turns = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        media = (MediaPart("image", PICTURE), TextPart("\n")) if i == 0 else ()
        turns.append(Message("user", (*media, TextPart(question))))
        turns.append(Message("assistant", (TextPart(answer),)))
    return tuple(turns)


def processor_with(tokenizer, template):
    config = tiny()[1].config
    config.text_config.vocab_size = len(tokenizer) + 300
    return AVLlavaProcessor(tokenizer, config, template)


def learned(processor, chats):
    """The runs of learned tokens of each sample, decoded, as the shifted loss sees them."""
    samples = [Sample(str(i), chat, f"f:{i}") for i, chat in enumerate(chats)]
    data = dataset_of(samples, processor, digest="pictures in memory")
    batch = data.__getitems__(list(range(len(samples))))
    out = []
    for row, ids in zip(
        batch["labels"][:, 1:].tolist(), batch["input_ids"][:, 1:].tolist(), strict=True
    ):
        runs, before = [], IGNORE_INDEX
        for label, token in zip(row, ids, strict=True):
            if label != IGNORE_INDEX:
                assert label == token, "a label is the token of its own place"
                if before == IGNORE_INDEX:
                    runs.append([])
                runs[-1].append(label)
            before = label
        out.append([processor.tokenizer.decode(run) for run in runs])
    return out


QUESTIONS_AND_ANSWERS = st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3)
PROPERTY = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def bos_tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(golden("llava/_families/tokenizer_bos"))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@PROPERTY
@given(turns=QUESTIONS_AND_ANSWERS)
@example(turns=[("USER: a", "ASSISTANT: b"), ("<|im_end|>", "</s>"), ("!", "!")])
def test_exactly_the_answers_and_end_tokens_are_learned(name, turns):
    template, processor = TEMPLATES[name], processor_with(tiny_tokenizer(), name)
    questions, answers = zip(*turns, strict=True)
    expected = [template.answer_start + a + template.answer_end for a in answers]
    # The second sample is longer: the first one is padded.
    other = (*turns, ("more " * 20, "last"))
    found = learned(
        processor, [conversation(questions, answers), conversation(*zip(*other, strict=True))]
    )
    assert found[0] == expected
    assert found[1] == [*expected, template.answer_start + "last" + template.answer_end]


@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["chatml", "with generation marks"])
@PROPERTY
@given(turns=QUESTIONS_AND_ANSWERS)
def test_the_tokenizers_own_template(source, turns):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = source
    questions, answers = zip(*turns, strict=True)
    found = learned(processor_with(tokenizer, "jinja"), [conversation(questions, answers)])
    assert found == [[f"{a}<|im_end|>" for a in answers]]


@PROPERTY
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_the_tokenizers_own_template_with_a_first_token(bos_tokenizer, turns):
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.chat_template = WITH_BOS
    questions, answers = zip(*turns, strict=True)
    found = learned(processor_with(tokenizer, "jinja"), [conversation(questions, answers)])
    assert [x.strip() for x in found[0]] == [f"{a}{tokenizer.eos_token}" for a in answers]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_tokenizer_with_a_first_token(name, bos_tokenizer):
    template, processor = TEMPLATES[name], processor_with(bos_tokenizer, name)
    found = learned(processor, [conversation(["What is it?", "And then?"], ["A dog.", "It runs."])])
    assert found == [
        [template.answer_start + a + template.answer_end for a in ("A dog.", "It runs.")]
    ]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_learns_to_stop(name):
    """The end token is learned, also where it is the padding token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    template = TEMPLATES[name]
    found = learned(
        processor_with(tokenizer, name),
        [conversation(["a"], ["b"]), conversation(["a " * 30], ["b"])],
    )
    assert all(x[0].endswith(template.answer_end) for x in found) and template.answer_end
