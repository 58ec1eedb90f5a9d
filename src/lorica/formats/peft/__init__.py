"""PEFT's files: written where PEFT's formula is exact, read whichever program wrote them."""
