"""Small vocabularies for generated tasks. Few words keep them learnable by tiny models."""

CATEGORIES = {
    "animal": ("cat", "dog", "cow", "hen", "fox", "owl", "pig", "bee"),
    "color": ("red", "blue", "green", "pink", "black", "white", "gray", "gold"),
    "food": ("bread", "rice", "soup", "cake", "egg", "corn", "bean", "pie"),
    "tool": ("saw", "axe", "nail", "drill", "rope", "pump", "lamp", "key"),
    "place": ("park", "lake", "farm", "shop", "port", "hill", "town", "cave"),
    "cloth": ("hat", "coat", "sock", "shoe", "scarf", "glove", "belt", "shirt"),
}
NOUNS = tuple(w for c in ("animal", "food", "tool", "place", "cloth") for w in CATEGORIES[c])
COLORS = CATEGORIES["color"]
NAMES = ("ana", "ben", "chen", "dora", "emil", "fay", "gus", "hana", "ivan", "jo", "kim", "leo")
VERBS = ("buy", "find", "sell", "wash", "move", "check", "paint", "fix")

SOME_NOUNS = tuple(w for c in ("animal", "tool", "cloth", "food") for w in CATEGORIES[c][:4])
FEW_COLORS = COLORS[:4]
"""Colors of the easiest tasks: a model trained for minutes has seen each many times."""
