"""The plan: its rules and their checks, and fairseq's own YAML as one."""
