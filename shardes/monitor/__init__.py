"""Looking at runs from outside: following, plotting, verifying."""
