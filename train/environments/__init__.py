"""Episodes of several turns: the protocol, tools from functions, adapters of other libraries."""
