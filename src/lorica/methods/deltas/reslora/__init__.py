"""ResLoRA, the links between its layers, and how it is approximated by one matrix a layer."""

from lorica.methods.deltas.reslora.merging import approximated

__all__ = ["approximated"]
