"""The default mix of the generated tasks."""

# Share of the examples by task. Tool arguments and long copies had the lowest accuracy with the first recipe.
MIX = {
    "add": 0.28,
    "sub": 0.22,
    "reverse": 0.14,
    "tool_call": 0.12,
    "tool_round_trip": 0.10,
    "compare": 0.06,
    "copy": 0.05,
    "greeting": 0.03,
}
