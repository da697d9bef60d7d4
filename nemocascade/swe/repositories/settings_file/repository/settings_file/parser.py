"""From text to sections."""

from settings_file.lines import Broken, read_value, strip_comment


def parse(text):
    """Values by key, by section; what stands before the first section is in section "".

    Raises Broken with the number of the line.
    """
    section = {}
    out = {"": section}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = strip_comment(raw).strip()
        if not line:
            continue
        if line.startswith("[") and line.endswith("]"):
            section = out.setdefault(line[1:-1].strip(), {})
            continue
        key, sign, value = line.partition("=")
        if not sign or not key.strip():
            raise Broken(f"line {number}: {raw!r}")
        section[key.strip()] = read_value(value.strip())
    return out
