//! The OpenAPI description, generated from the routes and the types.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::ROOT;
use super::routes::{ROUTES, Route};

/// The description as an object.
pub fn document() -> Value {
    let mut generator = SchemaSettings::openapi3().into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let method = if route.get { "get" } else { "put" };
        let mut operation = Map::new();
        operation.insert("summary".to_owned(), route.summary.into());
        operation.insert("operationId".to_owned(), operation_id(route.name).into());
        if let Some(body) = route.body {
            let schema = body(&mut generator);
            let content = json!({ "application/json": { "schema": schema } });
            operation.insert("requestBody".to_owned(), json!({ "required": true, "content": content }));
        }
        let mut responses = Map::new();
        for status in route.statuses {
            let reply = route.reply.filter(|_| *status == 200).map(|reply| reply(&mut generator));
            responses.insert(
                status.to_string(),
                response(*status, reply.as_ref().map(schemars::Schema::as_value)),
            );
        }
        operation.insert("responses".to_owned(), Value::Object(responses));
        paths.insert(format!("/{}", route.name), json!({ method: operation }));
    }
    let schemas = generator.take_definitions(true);
    json!({
        "openapi": "3.0.3",
        "info": {
            "title": "Holdfast API",
            "description": "Local HTTP API of a Holdfast virtual machine monitor; Cloud Hypervisor's where it has it.",
            "license": { "name": "Apache-2.0 OR MIT" },
            "version": env!("CARGO_PKG_VERSION"),
        },
        "servers": [{ "url": format!("http://localhost{ROOT}") }],
        "paths": paths,
        "components": { "schemas": schemas },
    })
}

/// The description as text.
pub fn text() -> String {
    format!("{:#}", document())
}

fn response(status: u16, reply: Option<&Value>) -> Value {
    let description = match status {
        200 | 204 => "Done.",
        400 => "The request is not valid.",
        404 => "There is no VM, or no such device.",
        409 => "The identifier or path is in use.",
        429 => "An earlier request of this kind is under way.",
        _ => "It could not be done.",
    };
    let reasons =
        json!({ "type": "array", "items": { "type": "string" }, "description": "Outermost first." });
    match (status, reply) {
        (200, Some(schema)) => {
            json!({ "description": description, "content": { "application/json": { "schema": schema } } })
        }
        (200 | 204, _) => json!({ "description": description }),
        _ => json!({ "description": description, "content": { "application/json": { "schema": reasons } } }),
    }
}

/// `vm.add-disk` as `vmAddDisk`.
fn operation_id(name: &str) -> String {
    let mut id = String::new();
    let mut upper = false;
    for c in name.chars() {
        if matches!(c, '.' | '-') {
            upper = true;
        } else if std::mem::take(&mut upper) {
            id.push(c.to_ascii_uppercase());
        } else {
            id.push(c);
        }
    }
    id
}

/// Names of all routes.
pub fn routes() -> impl Iterator<Item = &'static str> {
    ROUTES.iter().map(|Route { name, .. }| *name)
}
