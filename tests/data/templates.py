"""Chat templates of the kinds in use, written for the tests, with what each does to a turn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A template, what it writes behind an assistant's turn, and which conversations it takes."""

    text: str
    end: str  # what is trained behind the content
    system: bool = True
    alternates: bool = False  # user and assistant in turn, the user first
    tools: bool = False
    marked: bool = False


_BOS = "{{ bos_token }}"
_ROLE = "{{ '<|im_start|>' + m['role'] + '\\n' }}"

TEMPLATES = {
    # OpenAI's markup, as most models have it.
    "chatml": Kind(
        "{% for m in messages %}" + _ROLE + "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # A default system prompt (Qwen2.5's kind): it looks at the first message.
    "default system": Kind(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nbe kind<|im_end|>\\n' }}"
        "{% endif %}{% for m in messages %}" + _ROLE + "{{ m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # Headers and a date (Llama 3's kind), BOS inside.
    "dated": Kind(
        _BOS + "{{ 'Today is ' + strftime_now('%d %b %Y') + '\\n' }}{% for m in messages %}"
        "{{ '<|head|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\\n\\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # The system message folded into the first turn (Llama 2's kind).
    "folded": Kind(
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}{% else %}"
        "{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first %}{{ system }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        alternates=True,
    ),
    # No system role at all (Gemma's kind).
    "no system": Kind(
        _BOS + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' "
        "else m['role']) + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
        "<|im_end|>",
        system=False,
    ),
    # An end of text that a later turn takes away (Phi-3's kind).
    "end of text": Kind(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        "<|im_end|>\n</s>",
    ),
    # An empty thought in the last turn alone (Qwen3's kind).
    "thinking": Kind(
        "{% for m in messages %}" + _ROLE + "{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # The generation prompt shuts the thought, which the rendered turn lacks.
    "shut thought": Kind(
        "{% for m in messages %}" + _ROLE + "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # Tools before the last user message (Mistral's kind): they move with each turn.
    "moving tools": Kind(
        _BOS + "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{% if tools and m == last %}{{ '[TOOLS]' + tools | tojson }}{% endif %}"
        "{{ '[' + m['role'] + '] ' + m['content'] + ' [/]' }}{% endif %}{% endfor %}",
        "</s>",
        tools=True,
    ),
    # Tools at the top.
    "tools": Kind(
        "{% if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}{% for m in messages %}"
        + _ROLE + "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
        tools=True,
    ),
    # Marks of the assistant's part, with the end mark in them.
    "marked": Kind(
        "{% for m in messages %}" + _ROLE + "{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
        marked=True,
    ),
    # Earlier answers shortened, so that no two turns share a text; with marks.
    "forgetful": Kind(
        "{% for m in messages %}{{ m['role'] + '> ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] if loop.last else '(said)' }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}",
        "</s>",
        marked=True,
    ),
    # Nothing but words, and no end mark of any kind.
    "words": Kind(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "\n",
    ),
}  # fmt: skip
"""The kinds by name. `<|im_end|>` is a special token of the tests' tokenizer, `<|head|>` is not."""
