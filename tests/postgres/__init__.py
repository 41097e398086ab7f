"""The audit in Postgres, against a server that these tests start: make test-postgres."""
