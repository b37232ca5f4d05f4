"""Floor 1: numbers. Imports torch and nothing of ours; knows no layer."""
