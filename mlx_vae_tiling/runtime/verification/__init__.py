"""How far a decode is from the exact one."""
