"""The order of tasks that depend on each other."""


class Cycle(Exception):
    """Tasks wait for each other for ever."""


def arrange(needs):
    """Task names so that each comes after all that it needs; by name where that leaves a choice.

    needs: for each task, the tasks that it needs. Raises Cycle if there is no such order.
    """
    waiting = {name: set(others) for name, others in needs.items()}
    for others in list(waiting.values()):
        for name in others:
            waiting.setdefault(name, set())
    done = []
    while waiting:
        ready = sorted(name for name, others in waiting.items() if not others - set(done))
        if not ready:
            raise Cycle(", ".join(sorted(waiting)))
        done.append(ready[0])
        del waiting[ready[0]]
    return done
