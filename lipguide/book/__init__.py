"""How the book is made: building, ledgers, what makes a chapter stale, figures."""
