from outcome import Picked


def choose(room, target, budget_ms) -> Picked:
    raise NotImplementedError
