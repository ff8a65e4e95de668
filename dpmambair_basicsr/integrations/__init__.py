"""Other programs that can use our networks. Nothing here is imported by itself: each module needs its program."""
