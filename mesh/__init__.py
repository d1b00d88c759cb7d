"""The shells: the Serve application, the gateway, the controller, the front door, client and CLI."""
