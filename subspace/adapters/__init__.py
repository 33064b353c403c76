"""The contract of a method, the register, what acts on adapters (inject, merge, save, count), and shared bases."""
