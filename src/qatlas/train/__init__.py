"""FLOOR 5: time. Tasks, the one training loop, teachers, calibration, evaluation and resuming."""
