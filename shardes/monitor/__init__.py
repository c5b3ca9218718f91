"""Tools that look at runs from outside: watching, plotting, verifying."""
