"""What the kernel of a chapter runs before its first cell. It leaves no name behind that a cell could come to need."""

if __name__ == "__main__":
    __import__("gc").set_threshold(50_000, 20, 50)
