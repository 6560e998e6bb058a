//! `query-qmp-schema`, generated from the types of the commands (QEMU's `qapi/introspect.json`).

use std::collections::BTreeMap;

use holdfast_vmm::control::{Event, Origin};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::commands::COMMANDS;

/// One entity of the schema. Its further members depend on `meta-type`.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct SchemaInfo {
    name: String,
    #[serde(rename = "meta-type")]
    meta_type: String,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// Builds entities out of JSON schemas.
#[derive(Default)]
struct Builder {
    definitions: Map<String, Value>,
    entities: BTreeMap<String, SchemaInfo>,
}

/// All entities: commands, events and the types that they use.
pub fn document() -> Vec<SchemaInfo> {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let schemas: Vec<(Value, Value)> = COMMANDS
        .iter()
        .map(|command| {
            let arguments = (command.arguments)(&mut generator).to_value();
            (arguments, (command.returns)(&mut generator).to_value())
        })
        .collect();
    let mut builder = Builder { definitions: generator.take_definitions(true), ..Builder::default() };
    let mut out = Vec::new();
    for (command, (arguments, returns)) in COMMANDS.iter().zip(&schemas) {
        let rest = [
            ("arg-type", Value::String(builder.type_of(arguments))),
            ("ret-type", Value::String(builder.type_of(returns))),
            ("allow-oob", Value::Bool(false)),
        ];
        out.push(entity(command.name, "command", rest));
    }
    for (name, data) in events() {
        let arg_type = builder.event_type(name, data.as_ref());
        out.push(entity(name, "event", [("arg-type", Value::String(arg_type))]));
    }
    out.extend(builder.entities.into_values());
    out
}

/// The events that there are, with an example of their data.
fn events() -> Vec<(&'static str, Option<Value>)> {
    let all = [
        Event::Shutdown(Origin::Guest),
        Event::Rebooted(Origin::Guest),
        Event::Paused,
        Event::Resumed,
        Event::PowerButton,
        Event::GuestPanic,
    ];
    all.iter().filter_map(Event::qmp).collect()
}

fn entity<const N: usize>(name: &str, meta_type: &str, rest: [(&str, Value); N]) -> SchemaInfo {
    let rest = rest.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    SchemaInfo { name: name.to_owned(), meta_type: meta_type.to_owned(), rest }
}

impl Builder {
    fn add<const N: usize>(&mut self, name: &str, meta_type: &str, rest: [(&str, Value); N]) -> String {
        self.entities.insert(name.to_owned(), entity(name, meta_type, rest));
        name.to_owned()
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        self.add(name, "builtin", [("json-type", json_type.into())])
    }

    /// The name of the type that `schema` describes; the type is added if it is new.
    fn type_of(&mut self, schema: &Value) -> String {
        if let Some(path) = schema.get("$ref").and_then(Value::as_str) {
            let name = path.rsplit('/').next().unwrap_or_default().to_owned();
            return self.named(&name);
        }
        if let Some(branch) = schema.get("anyOf").and_then(Value::as_array).and_then(|all| all.first()) {
            return self.type_of(&branch.clone());
        }
        match json_type(schema) {
            "string" => self.builtin("str", "string"),
            "integer" => self.builtin("int", "int"),
            "number" => self.builtin("number", "number"),
            "boolean" => self.builtin("bool", "boolean"),
            "array" => {
                let element = self.type_of(schema.get("items").unwrap_or(&Value::Null));
                self.add(&format!("[{element}]"), "array", [("element-type", element.clone().into())])
            }
            _ => self.builtin("any", "value"),
        }
    }

    fn named(&mut self, name: &str) -> String {
        // A type that is under way is there already: types may refer to themselves.
        if self.entities.contains_key(name) {
            return name.to_owned();
        }
        let Some(schema) = self.definitions.get(name).cloned() else { return self.builtin("any", "value") };
        if let Some((tag, cases)) = cases(&schema) {
            return self.union(name, &tag, &cases);
        }
        if let Some(values) = variants(&schema) {
            let members: Vec<Value> = values.iter().map(|value| json!({ "name": value })).collect();
            return self.add(name, "enum", [("members", members.into()), ("values", values.into())]);
        }
        if json_type(&schema) != "object" {
            return self.type_of(&schema);
        }
        self.add(name, "object", [("members", Value::Array(Vec::new()))]);
        let members = self.members(&schema, None);
        self.add(name, "object", [("members", members.into())])
    }

    /// An object whose further members depend on a member called `tag`.
    fn union(&mut self, name: &str, tag: &str, cases: &[(String, Value)]) -> String {
        self.add(name, "object", [("members", Value::Array(Vec::new()))]);
        let names: Vec<&str> = cases.iter().map(|(case, _)| case.as_str()).collect();
        let members: Vec<Value> = names.iter().map(|value| json!({ "name": value })).collect();
        let kind =
            self.add(&format!("{name}Kind"), "enum", [("members", members.into()), ("values", json!(names))]);
        let mut variants = Vec::new();
        for (case, branch) in cases {
            let members = self.members(branch, Some(tag));
            let wrapper = self.add(&format!("{name}-{case}"), "object", [("members", members.into())]);
            variants.push(json!({ "case": case, "type": wrapper }));
        }
        let rest = [
            ("members", json!([{ "name": tag, "type": kind }])),
            ("tag", json!(tag)),
            ("variants", variants.into()),
        ];
        self.add(name, "object", rest)
    }

    /// The members of an object, but for the one called `without`.
    fn members(&mut self, schema: &Value, without: Option<&str>) -> Vec<Value> {
        let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
        let mut members = Vec::new();
        for (member, of) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            if without == Some(member.as_str()) {
                continue;
            }
            let mut info = json!({ "name": member, "type": self.type_of(of) });
            if !required.iter().any(|name| name == member) {
                // `default: null` marks an optional member.
                info["default"] = Value::Null;
            }
            members.push(info);
        }
        // What is flattened into it and may be missing.
        for branch in schema.get("anyOf").and_then(Value::as_array).into_iter().flatten() {
            let more = branch.get("$ref").and_then(Value::as_str).and_then(|p| p.rsplit('/').next());
            if let Some(flattened) = more.and_then(|name| self.definitions.get(name).cloned()) {
                for mut info in self.members(&flattened, None) {
                    info["default"] = Value::Null;
                    members.push(info);
                }
            }
        }
        members
    }

    fn event_type(&mut self, event: &str, data: Option<&Value>) -> String {
        let Some(data) = data.and_then(Value::as_object) else {
            return self.add("Empty", "object", [("members", Value::Array(Vec::new()))]);
        };
        let mut members = Vec::new();
        for (member, value) in data {
            let kind =
                if value.is_boolean() { json!({ "type": "boolean" }) } else { json!({ "type": "string" }) };
            members.push(json!({ "name": member, "type": self.type_of(&kind) }));
        }
        self.add(&format!("{event}-arg"), "object", [("members", members.into())])
    }
}

fn json_type(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(name)) => name,
        Some(Value::Array(names)) => {
            names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or_default()
        }
        _ => "",
    }
}

/// The branches of an enumeration whose values have contents: the member that says which it is, and each branch by its name.
fn cases(schema: &Value) -> Option<(String, Vec<(String, Value)>)> {
    let branches = schema.get("oneOf").and_then(Value::as_array)?;
    let named = |branch: &Value| {
        let properties = branch.get("properties")?.as_object()?;
        properties.iter().find_map(|(key, of)| Some((key.clone(), of.get("const")?.as_str()?.to_owned())))
    };
    let all: Option<Vec<_>> =
        branches.iter().map(|b| named(b).map(|(t, case)| (t, case, b.clone()))).collect();
    let all = all?;
    let tag = all.first()?.0.clone();
    Some((tag, all.into_iter().map(|(_, case, branch)| (case, branch)).collect()))
}

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
