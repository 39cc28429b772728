"""How answers are read: rules of other harnesses, yes and no, spans of time, short texts."""
