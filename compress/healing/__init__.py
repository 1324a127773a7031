"""The parts of `compress heal` (compress/heal.py): what learns (adapters), from what (teacher) and by which measure (losses)."""
