"""What the server does with each field of a body, in each dialect."""
