"""Who may do what with an agent: certificates, tokens, and the record of what was done."""
