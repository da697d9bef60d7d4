"""Several files on top of each other, and values that name others."""


def overlay(base, top):
    """The settings of `base` with those of `top` over them; neither is changed."""
    out = {name: dict(section) for name, section in base.items()}
    for name, section in top.items():
        out.setdefault(name, {}).update(section)
    return out


def expand(settings, depth=10):
    """Each text with `{section.key}` in it filled in. Raises ValueError where that never ends."""
    out = {name: dict(section) for name, section in settings.items()}
    for _ in range(depth):
        changed = False
        for section in out.values():
            for key, value in section.items():
                if isinstance(value, str) and "{" in value:
                    section[key] = _fill(out, value)
                    changed = True
        if not changed:
            return out
    raise ValueError("settings name each other in a circle")


def _fill(settings, text):
    head, _, rest = text.partition("{")
    name, _, tail = rest.partition("}")
    section, _, key = name.rpartition(".")
    return f"{head}{settings[section][key]}{tail}"
