"""The templates by name, and which one a checkpoint uses.

Contract: :data:`TEMPLATES` is a plain dict that code outside the package may add to. The
choice in :func:`template_for` rests on a stored name, the type of the language model and its
end token, never on the name of a folder. The texts and names are those that LLaVA-NeXT's
checkpoints were trained with (llava/conversation.py); ``llama_3`` is Meta's published format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from av_llava.chat.jinja import JINJA, JinjaTemplate, TokenizerWithTemplate
from av_llava.chat.messages import Message
from av_llava.chat.templates import ChatTemplate, Rendered, Template
from av_llava.errors import UsageError, unknown_name

_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_CURIOUS_USER = _CURIOUS_HUMAN.replace("human", "user")
_VISUAL_TASKS = (
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LANGUAGE_AND_VISION = f"You are a helpful language and vision assistant. {_VISUAL_TASKS}"
_TAGGED = (
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    f"{_VISUAL_TASKS.replace('You are', 'The assistant is')}{_TAGGED}"
)
_SIMPLE_SYSTEM = "Answer the questions about the visual content that the user provides."
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
_ENERGY_EXAMPLE = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n",
)
_MEDIA_TAG = ("<Image>", "</Image>")

_V0 = Template(
    name="llava_v0",
    system=_CURIOUS_HUMAN,
    system_end="###",
    user_start="Human: ",
    user_end="###",
    assistant_start="Assistant:",
    answer_start=" ",
    answer_end="###",
)
_V1 = Template(
    name="vicuna_v1",
    system=_CURIOUS_USER,
    system_end=" ",
    user_start="USER: ",
    user_end=" ",
    assistant_start="ASSISTANT:",
    answer_start=" ",
    answer_end="</s>",
)
_LLAMA_2 = Template(
    name="llama_2",
    system=_LLAMA_2_SYSTEM,
    system_start="<<SYS>>\n",
    system_end="\n<</SYS>>\n\n",
    system_in_user=True,
    user_start="[INST] ",
    user_end=" [/INST]",
    between="<s>",
    answer_start=" ",
    answer_end=" </s>",
)
_MISTRAL = replace(_LLAMA_2, name="mistral_instruct", system="", between="")
_LLAMA_3 = Template(
    name="llava_llama_3",
    system=_LANGUAGE_AND_VISION,
    system_start="<|start_header_id|>system<|end_header_id|>\n\n",
    system_end="<|eot_id|>",
    user_start="<|start_header_id|>user<|end_header_id|>\n\n",
    user_end="<|eot_id|>",
    assistant_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer_end="<|eot_id|>",
)
# LLaVA's "MPT" style: ChatML without newlines between the turns.
_MPT = Template(
    name="mpt",
    system="A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
    system_start="<|im_start|>system\n",
    system_end="<|im_end|>",
    user_start="<|im_start|>user\n",
    user_end="<|im_end|>",
    assistant_start="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
)
_DIRECT = replace(_MPT, name="chatml_direct", system="Answer the questions.")
_ORCA = replace(
    _MPT,
    name="mistral_orca",
    system="You are MistralOrca, a large language model trained by Alignment Lab AI. "
    "Write out your reasoning step-by-step to be sure you get the right answers!",
)
_ZEPHYR = Template(
    name="mistral_zephyr",
    system="You are a helpful AI assistant.",
    system_start="<|system|>\n",
    system_end="</s>",
    user_start="<|user|>\n",
    user_end="</s>",
    assistant_start="<|assistant|>\n",
    answer_end="</s>",
)
_QWEN = replace(
    _MPT,
    name="qwen_1_5",
    system="You are a helpful assistant.",
    system_end="<|im_end|>\n",
    user_end="<|im_end|>\n",
    after_answer="\n",
)
_QWEN_2_5 = replace(
    _QWEN,
    name="qwen_2_5",
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
_GEMMA = Template(
    name="gemma_instruct",
    system_end="\n\n",
    system_in_user=True,
    user_start="<start_of_turn>user\n",
    user_end="<end_of_turn>\n",
    assistant_start="<start_of_turn>model\n",
    answer_end="<end_of_turn>",
    after_answer="\n",
)
_PLAIN = Template(name="plain", user_end="\n", answer_end="\n", bare_media=True)

_BY_NAME: dict[str, Template] = {
    "default": replace(_V0, examples=(_ENERGY_EXAMPLE,)),
    "v0": replace(_V0, examples=(_ENERGY_EXAMPLE,)),
    "v1": _V1,
    "vicuna_v1": _V1,
    "llama_2": _LLAMA_2,
    "mistral_instruct": _MISTRAL,
    "mistral_orca": _ORCA,
    "mistral_zephyr": _ZEPHYR,
    "mistral_direct": _DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "chatml_direct": _DIRECT,
    "llava_v0": _V0,
    "llava_v0_mmtag": replace(_V0, system=_MMTAG_SYSTEM, media_tag=_MEDIA_TAG),
    "llava_v1": replace(_V1, system=_CURIOUS_HUMAN),
    "llava_v1_mmtag": replace(_V1, system=_MMTAG_SYSTEM, media_tag=_MEDIA_TAG),
    "llava_llama_2": replace(_LLAMA_2, system=_LANGUAGE_AND_VISION),
    "llava_llama_2_simple": replace(_LLAMA_2, system=_SIMPLE_SYSTEM),
    "llava_llama_2_mmtag": replace(_LLAMA_2, system=_SIMPLE_SYSTEM + _TAGGED, media_tag=_MEDIA_TAG),
    "llava_llama_3": _LLAMA_3,
    "llava_mistral_instruct": _MISTRAL,
    "mpt": _MPT,
    "qwen_1_5": _QWEN,
    "qwen_2": _QWEN,
    "qwen_2_5": _QWEN_2_5,
    "gemma_instruct": _GEMMA,
    # Short names of ours.
    "llama_3": _LLAMA_3,
    "mistral": _MISTRAL,
    "chatml": _QWEN,
    "qwen": _QWEN,
    "gemma": _GEMMA,
}

TEMPLATES: dict[str, Template] = {name: replace(t, name=name) for name, t in _BY_NAME.items()}
"""Name → template. Adding an entry makes it known to rendering, checkpoints and the CLI."""

TEMPLATE_CHOICE: list[tuple[str, str | None, str]] = [
    ("llama", "<|eot_id|>", "llava_llama_3"),
    ("llama", "<|im_end|>", "chatml_direct"),
    ("llama", None, "vicuna_v1"),
    ("mistral", "<|im_end|>", "mistral_direct"),
    ("mistral", None, "mistral_instruct"),
    ("mixtral", None, "mistral_instruct"),
    ("qwen2", None, "qwen_1_5"),
    ("qwen2_moe", None, "qwen_1_5"),
    ("qwen3", None, "qwen_1_5"),
    ("qwen3_moe", None, "qwen_1_5"),
    ("gemma", None, "gemma_instruct"),
    ("gemma2", None, "gemma_instruct"),
    ("gemma3_text", None, "gemma_instruct"),
    ("mpt", None, "mpt"),
]
"""Type of the language model, its end token (None: any), name of the template; first match."""


def template_named(name: str, tokenizer: TokenizerWithTemplate | None = None) -> ChatTemplate:
    """Return the template of a name; ``"jinja"`` is the tokenizer's own.

    Raises:
        UsageError: an unknown name, or ``"jinja"`` without a tokenizer that has a template.
    """
    if name == JINJA:
        if tokenizer is None:
            raise UsageError("The chat template 'jinja' needs the tokenizer that holds it.")
        return JinjaTemplate(tokenizer)
    if name not in TEMPLATES:
        raise unknown_name("chat template", name, [*TEMPLATES, JINJA])
    return TEMPLATES[name]


def template_for(
    stored: str | None = None,
    *,
    model_type: str | None = None,
    tokenizer: TokenizerWithTemplate | None = None,
) -> ChatTemplate:
    """Choose the template of a checkpoint.

    Args:
        stored: the name that the checkpoint's config or processor holds; it decides if given.
        model_type: the type of the language model as transformers calls it (``"llama"``,
            ``"mistral"``, ``"qwen2"``, …); looked up in :data:`TEMPLATE_CHOICE`.
        tokenizer: gives the end token, and its own template when the table has no row.

    Raises:
        UsageError: an unknown stored name, or nothing to choose by.
    """
    if stored is not None:
        return template_named(stored, tokenizer)
    eos = None if tokenizer is None else tokenizer.eos_token
    for row_type, row_eos, name in TEMPLATE_CHOICE:
        if row_type == model_type and row_eos in (None, eos):
            return TEMPLATES[name]
    if tokenizer is not None and tokenizer.chat_template:
        return JinjaTemplate(tokenizer)
    raise UsageError(
        f"No chat template is known for the language model type {model_type!r}, and the tokenizer "
        f"has none of its own. Name one of: {', '.join(sorted(TEMPLATES))}."
    )


def render(
    template: str | ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool = False
) -> Rendered:
    """Render with a template or the name of one."""
    chosen = template_named(template) if isinstance(template, str) else template
    return chosen.render(messages, add_generation_prompt)
