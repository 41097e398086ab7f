"""The clients' scripts import packages that are in their own environments alone."""

collect_ignore_glob = ["clients/*"]
