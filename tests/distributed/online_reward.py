"""The reward of tests of rl.engine: an untrained model is right about nothing, but its answers have lengths."""


def score(completion: str, answer: str, record: dict) -> float:
    return float(len(completion) % 3)
