"""What reproduction.py is made of: studies, their budgets and cells, statistics, tables and plots."""
