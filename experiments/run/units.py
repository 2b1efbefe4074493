"""How a metric is written: fractions in percent, anything else as the number that it is."""

__all__ = ["scale", "shown", "words"]

_FRACTIONS = {"error"}


def scale(metric: str) -> float:
    """What a value is multiplied with before it is written.

    Example:
        >>> scale("error"), scale("bits_per_byte")
        (100.0, 1.0)
    """
    return 100.0 if metric in _FRACTIONS else 1.0


def words(metric: str) -> str:
    """Its name as a reader expects it.

    Example:
        >>> words("bits_per_byte")
        'bits per byte'
    """
    return metric.replace("_", " ")


def shown(metric: str, value: float, digits: int | None = None) -> str:
    """A value as a reader expects it.

    Example:
        >>> shown("error", 0.0123), shown("bits_per_byte", 2.34567)
        ('1.23 %', '2.346')
    """
    if metric in _FRACTIONS:
        return f"{100 * value:.{2 if digits is None else digits}f} %"
    return f"{value:.{3 if digits is None else digits}f}"
