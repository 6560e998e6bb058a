//! The keys of an option, from the schema of its struct.

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// A key of an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Its name on the command line.
    pub name: String,
    /// Its name in JSON.
    pub json_name: String,
    /// What its value looks like: `on|off`, `N`, `tty|pty|...`.
    pub value: String,
    /// Its default, as text.
    pub default: Option<String>,
    /// What it is for.
    pub description: String,
    /// It must be given.
    pub required: bool,
    /// A bare first word sets it.
    pub positional: bool,
}

/// The keys of `T`, in the order of its fields.
pub fn keys<T: JsonSchema>() -> Vec<Key> {
    let schema = schemars::SchemaGenerator::default().into_root_schema_for::<T>();
    let root = schema.as_value();
    let required = root.get("required").and_then(Value::as_array);
    let is_required = |name: &str| required.is_some_and(|names| names.iter().any(|other| other == name));
    let properties = root.get("properties").and_then(Value::as_object);
    let properties = properties.into_iter().flatten();
    properties
        .map(|(json_name, property)| {
            let extension = |name: &str| property.get(name);
            Key {
                name: extension("x-cli").and_then(Value::as_str).unwrap_or(json_name).to_owned(),
                json_name: json_name.clone(),
                value: value_text(root, property),
                default: property.get("default").and_then(default_text),
                description: description(root, property),
                required: is_required(json_name),
                positional: extension("x-positional").is_some(),
            }
        })
        .collect()
}

/// Replaces JSON names that serde mentions by those of the command line.
pub(crate) fn in_cli_words(keys: &[Key], mut message: String) -> String {
    for key in keys.iter().filter(|key| key.name != key.json_name) {
        message = message.replace(&format!("`{}`", key.json_name), &format!("`{}`", key.name));
    }
    message.replace("missing field", "missing key").replace("duplicate field", "duplicate key")
}

fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let target = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#'));
    if let Some(found) = target.and_then(|path| root.pointer(path)) {
        return found;
    }
    // Option<T> of a named T.
    let branches = schema.get("anyOf").and_then(Value::as_array);
    let named = branches.and_then(|all| all.iter().find(|branch| branch.get("$ref").is_some()));
    named.map_or(schema, |branch| resolve(root, branch))
}

fn description(root: &Value, schema: &Value) -> String {
    let own = schema.get("description").or_else(|| resolve(root, schema).get("description"));
    own.and_then(Value::as_str).unwrap_or_default().replace('\n', " ")
}

fn type_name(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(name)) => name,
        Some(Value::Array(names)) => {
            names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or_default()
        }
        _ => "",
    }
}

/// The names of an enum's variants.
fn variants(schema: &Value) -> Option<Vec<String>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    if let Some(names) = schema.get("enum").and_then(Value::as_array) {
        return Some(names.iter().filter_map(text).collect());
    }
    let branches = schema.get("oneOf").and_then(Value::as_array)?;
    let names = branches.iter().flat_map(|branch| match (branch.get("const"), branch.get("enum")) {
        (Some(name), _) => text(name).into_iter().collect(),
        (None, Some(names)) => names.as_array().into_iter().flatten().filter_map(text).collect(),
        (None, None) => Vec::new(),
    });
    Some(names.collect())
}

fn value_text(root: &Value, schema: &Value) -> String {
    let sized = schema.get("x-size").is_some();
    let schema = resolve(root, schema);
    if let Some(names) = variants(schema) {
        return names.iter().map(|name| kebab(name)).collect::<Vec<_>>().join("|");
    }
    match type_name(schema) {
        "boolean" => "on|off".to_owned(),
        "integer" | "number" if sized => "SIZE".to_owned(),
        "integer" | "number" => "N".to_owned(),
        "array" => {
            let item = schema.get("items").map(|items| value_text(root, items)).unwrap_or_default();
            format!("[{item},...]")
        }
        "object" => fields_text(root, schema.get("properties").and_then(Value::as_object)),
        _ => "TEXT".to_owned(),
    }
}

/// A struct inside a value: `a:b:c:d`, or `a@[b]` when the last field is a list.
fn fields_text(root: &Value, properties: Option<&Map<String, Value>>) -> String {
    let Some(properties) = properties else { return "TEXT".to_owned() };
    let list = properties.values().any(|field| type_name(resolve(root, field)) == "array");
    let fields = properties.iter().map(|(name, field)| {
        if type_name(resolve(root, field)) == "array" { format!("[{name}]") } else { name.clone() }
    });
    fields.collect::<Vec<_>>().join(if list { "@" } else { ":" })
}

fn default_text(value: &Value) -> Option<String> {
    match value {
        Value::Bool(true) => Some("on".to_owned()),
        Value::Bool(false) => Some("off".to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(kebab(text)),
        _ => None,
    }
}

/// `OnDemand` as `on-demand`; anything else that is not one word in camel case as it is.
pub(crate) fn kebab(name: &str) -> String {
    let camel = name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
        && name.chars().any(|c| c.is_ascii_lowercase());
    if !camel {
        return name.to_owned();
    }
    let mut out = String::new();
    for (i, c) in name.chars().enumerate() {
        if c.is_ascii_uppercase() && i > 0 {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
