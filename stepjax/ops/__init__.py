"""Operations that have a fast form and a slow twin."""
