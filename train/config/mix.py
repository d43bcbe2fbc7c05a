"""The default mix of generated tasks: a name of each task and its share of the examples."""

MIX = {  # share of the examples; tool arguments and long copies were the weakest spots of the first recipe
    "add": 0.28,
    "sub": 0.22,
    "reverse": 0.14,
    "tool_call": 0.12,
    "tool_round_trip": 0.10,
    "compare": 0.06,
    "copy": 0.05,
    "greeting": 0.03,
}
