"""How metrics are printed: fractions as percentages, anything else as a plain number."""

__all__ = ["describe_metric", "display_factor", "format_metric"]

_FRACTIONS = {"error"}


def display_factor(metric: str) -> float:
    """Factor from a logged value to the printed one: 100 for a fraction, else 1.

    Example:
        >>> display_factor("error"), display_factor("bits_per_byte")
        (100.0, 1.0)
    """
    return 100.0 if metric in _FRACTIONS else 1.0


def describe_metric(metric: str) -> str:
    """Name of a metric in words.

    Example:
        >>> describe_metric("bits_per_byte")
        'bits per byte'
    """
    return metric.replace("_", " ")


def format_metric(metric: str, value: float, digits: int | None = None) -> str:
    """A value with its unit.

    Args:
        metric: Name of the metric.
        value: Logged value; errors are fractions.
        digits: Decimal places. The default is 2 for percentages and 3 for other numbers.

    Example:
        >>> format_metric("error", 0.0123), format_metric("bits_per_byte", 2.34567)
        ('1.23 %', '2.346')
    """
    if metric in _FRACTIONS:
        return f"{100 * value:.{2 if digits is None else digits}f} %"
    return f"{value:.{3 if digits is None else digits}f}"
