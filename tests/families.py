"""Tiny models of many families of transformers, and what has to hold for each.

    python tests/families.py [--write] [FAMILY ...]

prints a line for each family, and with `--write` makes docs/families.md. `test_families.py` holds
the page to what comes out.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import lorica

COLUMNS = ("attach", "step", "save", "load", "peft", "merge", "detach", "checkpointing", "bf16")
KINDS = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "images": transformers.AutoModelForImageClassification,
}
FAMILIES: dict[str, str] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next",
            "gemma", "gemma2", "gemma3_text", "gemma3n_text", "phi", "phi3", "phimoe", "gpt2",
            "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "gpt_oss", "opt", "bloom", "falcon",
            "mpt", "stablelm", "starcoder2", "cohere", "cohere2", "olmo", "olmo2", "olmoe",
            "deepseek_v2", "deepseek_v3", "glm", "glm4", "glm4_moe", "granite", "granitemoe",
            "jamba", "jetmoe", "mamba", "mamba2", "zamba2", "nemotron", "persimmon", "smollm3",
            "exaone4", "ernie4_5", "ernie4_5_moe", "llama4_text", "hunyuan_v1_moe", "helium",
        ),
        "causal",
    ),
    **dict.fromkeys(("t5", "bart", "mbart", "pegasus"), "seq2seq"),
    **dict.fromkeys(
        ("bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert"), "classification"
    ),
    **dict.fromkeys(("vit", "dinov2", "beit"), "images"),
}  # fmt: skip
# A tiny value for each name that a configuration may have.
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "d_model": 32, "n_layers": 2,
    "n_heads": 4, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "d_ff": 48, "d_kv": 8, "dim": 32,
    "hidden_dim": 48, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "shared_expert_intermediate_size": 40,
    "rotary_dim": 8, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_conv": 4, "chunk_size": 8, "expand": 2,
    "conv_kernel": 4, "n_groups": 1, "word_embed_proj_dim": 32, "embedding_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "kv_channels": 8,
    "intermediate_size_mlp": 48, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "global_attn_every_n_layers": 1,
    "image_size": 16, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
# Sizes that belong to one family alone.
OWN: dict[str, dict[str, Any]] = {
    "llama4_text": {"num_experts_per_tok": 1},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "modernbert": {"local_attention": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 3,
                     "activation_sparsity_pattern": None},
}  # fmt: skip


def tiny(family: str) -> PreTrainedModel:
    """A tiny model of a family, the same each time."""
    kind = CONFIG_MAPPING[family]
    known = {*inspect.signature(kind.__init__).parameters}
    known |= {*vars(kind).get("__dataclass_fields__", {})}
    values = {k: v for k, v in SMALL.items() if k in known} | OWN.get(family, {})
    config = kind(**values)
    torch.manual_seed(0)
    model = KINDS[FAMILIES[family]].from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 3:  # fused experts are left as the memory was
                p.normal_(std=0.05)
            elif p.ndim == 1 and not name.endswith("bias") and not p.any():
                p.fill_(0.5)  # a gain that starts at zero lets no gradient through
    return model.eval()


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 90, (2, 8), generator=generator)
    both = {"input_ids": ids, "decoder_input_ids": ids}
    return both if model.config.is_encoder_decoder else {"input_ids": ids}


def logits(model: Any) -> Tensor:  # Any: a model of transformers', or PEFT's around one
    return model(**inputs(model)).logits


def near(got: Tensor, wanted: Tensor, what: str) -> None:
    error = float((got - wanted).abs().max())
    if not error < 1e-3:
        raise AssertionError(f"{what} differs by {error:.2g}")


@dataclass
class Trial:
    """One family's way through the columns."""

    family: str

    def run(self, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
        """{column: "" where it holds, else why not}."""
        out: dict[str, str] = {}
        self.folder = Path(tempfile.mkdtemp())
        self.model = tiny(self.family)
        with torch.no_grad():
            self.before = logits(self.model)
        steps: Mapping[str, Callable[[], str | None]] = {
            "attach": self.attach, "step": self.step, "save": self.save, "load": self.load,
            "peft": self.peft, "merge": self.merge, "detach": self.detach,
            "checkpointing": self.checkpointing, "bf16": self.bf16,
        }  # fmt: skip
        for name in columns:
            try:
                out[name] = steps[name]() or ""
            except Exception as error:  # whatever a family's own code raises
                out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return out

    def attach(self) -> None:
        self.adapters = lorica.attach(self.model, r=4, verbose=False)
        with torch.no_grad():
            near(logits(self.model), self.before, "the start")

    def step(self) -> None:
        self.model.train()
        optimizer = lorica.optimizer(self.adapters, lr=1e-2, total_steps=2)
        for _ in range(2):
            logits(self.model).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()
        with torch.no_grad():
            self.live = logits(self.model)
        assert not torch.equal(self.live, self.before), "two steps changed nothing"

    def save(self) -> None:
        lorica.save(self.adapters, self.folder / "adapter")

    def load(self) -> None:
        again = tiny(self.family)
        lorica.load(again, self.folder / "adapter")
        with torch.no_grad():
            near(logits(again), self.live, "the loaded one")

    def peft(self) -> str | None:
        told = json.loads((self.folder / "adapter" / "lorica.json").read_text(encoding="utf-8"))
        if told["form"] != "peft":
            return told["why_not_peft"]
        import peft

        read = peft.PeftModel.from_pretrained(tiny(self.family), self.folder / "adapter")
        with torch.no_grad():
            near(logits(read.base_model.model), self.live, "PEFT's")
        return None

    def merge(self) -> None:
        lorica.merge(self.model)
        with torch.no_grad():
            near(logits(self.model), self.live, "the merged one")
        self.model.save_pretrained(self.folder / "merged")
        read = type(self.model).from_pretrained(self.folder / "merged").eval()
        with torch.no_grad():
            near(logits(read), self.live, "the merged one, read again,")

    def detach(self) -> None:
        model = tiny(self.family)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        lorica.attach(model, r=4, verbose=False)
        lorica.detach(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "bytes differ"

    def checkpointing(self) -> str | None:
        model = tiny(self.family)
        if not model.supports_gradient_checkpointing:
            return "the model has none"
        adapters = lorica.load(model, self.folder / "adapter")
        model.train()
        model.config.use_cache = False

        def gradients() -> dict[str, Tensor]:
            torch.manual_seed(3)
            logits(model).float().square().mean().backward()
            held = {t.name: t.parameter.grad for t in adapters.trained()}
            model.zero_grad()
            return {n: g.clone() for n, g in held.items() if g is not None}

        plain = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6, msg=name)
        return None

    def bf16(self) -> None:
        model = tiny(self.family).bfloat16()
        adapters = lorica.attach(model, r=4, verbose=False)
        model.train()
        given = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs(model).items()}
        model(**given).logits.float().square().mean().backward()
        grads = [t.parameter.grad for t in adapters.trained()]
        assert any(g is not None and bool(g.any()) for g in grads), "no gradient"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help="make docs/families.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, dict[str, str]] = {}
    for family in options.families or FAMILIES:
        try:
            found[family] = Trial(family).run()
        except Exception as error:  # the tiny model itself does not run
            found[family] = {"attach": f"not built: {type(error).__name__}: {str(error)[:160]}"}
        told = {n: why for n, why in found[family].items() if why}
        print(family, "; ".join(f"{n}: {why}" for n, why in told.items()) or "ok", flush=True)
    if options.write:
        page = Path(__file__).parents[1] / "docs" / "families.md"
        page.write_text(table(found), encoding="utf-8")


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """docs/families.md."""
    import peft

    notes: list[str] = []
    rows: list[str] = []
    for family, columns in found.items():
        cells = ["no" if columns.get(n, "not run") else "yes" for n in COLUMNS]
        rows.append(f"| {family} | {FAMILIES[family]} | {' | '.join(cells)} |")
        notes += [f"- {family}, {n}: {why}" for n, why in columns.items() if why]
    whole = sum(not any(columns.values()) for columns in found.values())
    return "\n".join([
        "# Families of models",
        "",
        "What was tried on a tiny, random model of each family, with LoRA of rank 4 on all that"
        " `all-linear` means. *peft*: PEFT reads the file and computes the same; *merge*: so does"
        " transformers with the merged model; *detach*: the base has its own bytes again.",
        "",
        f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch"
        f" {torch.__version__.split('+')[0]}. {whole} of {len(found)} families pass every column.",
        "",
        f"| family | task | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
        *rows,
        "",
        "The reasons, where one does not:",
        "",
        *notes,
        "",
        "`python tests/families.py --write` makes this page.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
