"""What items cost, in cents."""


def discount(count):
    """Per cent off for many: 5 from 10 on, 10 from 50 on."""
    if count >= 50:
        return 10
    if count >= 10:
        return 5
    return 0


def line_price(price, count):
    """Cents for `count` items with their discount, rounded to whole cents, halves up."""
    return (price * count * (100 - discount(count)) + 50) // 100


def postage(cents):
    """Cents for sending: nothing from 5000 on."""
    return 0 if cents >= 5000 else 490
