"""A fleet of simulated Jetsons on one Linux machine: real systemd, sshd and sudo, no GPU.

It knows the inventory format of Ansible and nothing else of what is run against its hosts.
"""
