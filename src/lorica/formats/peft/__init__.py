"""PEFT's files: written where PEFT's formula is exact, read whoever wrote them."""
