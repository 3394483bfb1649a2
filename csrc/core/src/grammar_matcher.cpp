#include "grammar_matcher.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

constexpr std::uint32_t kEmpty = 0;    // the stack, and the position that its node has
constexpr std::uint32_t kNoStack = 0;  // the state
constexpr std::uint32_t kUnknown = std::numeric_limits<std::uint32_t>::max();

// Steps from stack to stack, of about 50 ns. A token may take what earlier ones left of kMaxBudget, and each adds kBudget; no grammar that
// people write was seen to need a tenth of that.
constexpr std::int64_t kMaxBudget = 3'000'000;
constexpr std::int64_t kBudget = 500'000;
// What else counts as steps, for its time and memory.
constexpr std::size_t kNodeSteps = 2;
constexpr std::size_t kEntrySteps = 4;  // a state, or a transition by a character beyond ASCII
constexpr std::size_t kRowSteps = 16;
constexpr std::size_t kGroupsPerStep = 16;  // that are only looked at
constexpr std::size_t kCompactAt = 16u << 20;

std::uint64_t mixed(std::uint64_t value) {
    value ^= value >> 33;
    value *= 0xFF51AFD7ED558CCDull;
    value ^= value >> 33;
    return value;
}

std::uint64_t pair_of(std::uint32_t high, std::uint32_t low) {
    return std::uint64_t{high} << 32 | low;
}

// An element as one number.
std::uint64_t key_of(GrammarRules::Element element) {
    return pair_of(static_cast<std::uint32_t>(element.kind), element.value);
}

bool takes_tokens(GrammarRules::Kind kind) {
    return kind == GrammarRules::Kind::token || kind == GrammarRules::Kind::other_token;
}

// Whether an element takes a token whole, whatever its text.
bool takes(GrammarRules::Element element, std::int32_t token) {
    const bool same = element.value == static_cast<std::uint32_t>(token);
    return element.kind == GrammarRules::Kind::token ? same : element.kind == GrammarRules::Kind::other_token && !same;
}

}  // namespace

bool PartialCharacter::add(unsigned char byte) {
    if (missing == 0) {
        first = last = byte;
        if (byte < 0x80) {
            return true;
        }
        missing = byte >= 0xC2 && byte <= 0xDF ? 1 : byte >= 0xE0 && byte <= 0xEF ? 2 : byte >= 0xF0 && byte <= 0xF4 ? 3 : 0;
        const std::uint32_t shift = 6 * missing;
        first = (byte & (0x3Fu >> missing)) << shift;
        last = first | ((1u << shift) - 1);
        // Overlong forms, surrogates and what is past U+10FFFF are none.
        first = byte == 0xE0 ? 0x800 : byte == 0xF0 ? 0x10000 : first;
        last = byte == 0xED ? 0xD7FF : byte == 0xF4 ? 0x10FFFF : last;
        return missing > 0;
    }
    const std::uint32_t known = first >> (6 * missing) << (6 * missing);
    missing--;
    const std::uint32_t shift = 6 * missing;
    const std::uint32_t low = known | (byte & 0x3Fu) << shift;
    first = std::max(first, low);
    last = std::min(last, low | ((1u << shift) - 1));
    return (byte & 0xC0) == 0x80 && first <= last;
}

bool PartialCharacter::add(std::string_view bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [this](char byte) { return add(static_cast<unsigned char>(byte)); });
}

GrammarMatcher::GrammarMatcher(GrammarRules rules, std::shared_ptr<const TokenTrie> tokens, bool names_tokens)
    : rules_(std::move(rules)), tokens_(std::move(tokens)), names_tokens_(names_tokens), budget_(kBudget), compact_at_(kCompactAt) {
    begin();
    for (const std::uint32_t alternative : rules_.alternatives(rules_.root())) {
        todo_.push_back(rules_.at(alternative).kind == Kind::end ? kEmpty : intern(alternative, kEmpty));
    }
    expand();
    position_.state = intern_state();
    if (position_.state == kNoStack) {
        throw InvalidOptionError("grammar allows no text: 'root' is only ever itself");
    }
    budget_ = kMaxBudget;
}

// Nothing but the empty stack and the state without stacks.
void GrammarMatcher::begin() {
    // Not clear() and the like, which keep the memory.
    nodes_ = std::vector<Node>(1);
    node_table_ = std::vector<std::uint32_t>(64, kUnknown);
    seen_ = std::vector<std::uint32_t>(1);
    expansion_ = 0;
    states_ = std::vector<State>(1);
    state_nodes_ = std::vector<std::uint32_t>();
    groups_ = std::vector<Group>();
    rows_ = std::deque<Row>();
    state_table_ = decltype(state_table_)();
    next_ = decltype(next_)();
}

void GrammarMatcher::spend(std::size_t steps) {
    budget_ -= static_cast<std::int64_t>(steps);
    if (budget_ < 0) {
        throw InvalidOptionError(
            "grammar (or the JSON schema that it is of) is too ambiguous: the text so far can go on in too many different ways; avoid "
            "repetitions of what may be empty or is itself a repetition, and alternatives that begin with the same long parts");
    }
}

std::uint32_t GrammarMatcher::intern(std::uint32_t position, std::uint32_t below) {
    if (nodes_.size() * 2 > node_table_.size()) {
        node_table_.assign(node_table_.size() * 4, kUnknown);
        for (std::uint32_t node = 1; node < nodes_.size(); node++) {
            auto at = mixed(pair_of(nodes_[node].position, nodes_[node].below)) & (node_table_.size() - 1);
            while (node_table_[at] != kUnknown) {
                at = (at + 1) & (node_table_.size() - 1);
            }
            node_table_[at] = node;
        }
    }
    auto at = mixed(pair_of(position, below)) & (node_table_.size() - 1);
    while (node_table_[at] != kUnknown) {
        const Node& node = nodes_[node_table_[at]];
        if (node.position == position && node.below == below) {
            return node_table_[at];
        }
        at = (at + 1) & (node_table_.size() - 1);
    }
    spend(kNodeSteps);
    const auto added = static_cast<std::uint32_t>(nodes_.size());
    node_table_[at] = added;
    nodes_.push_back({position, below});
    seen_.push_back(0);
    return added;
}

GrammarMatcher::Element GrammarMatcher::top(std::uint32_t node) const {
    return node == kEmpty ? Element{Kind::end, 0} : rules_.at(nodes_[node].position);
}

// The stack once its top was read.
std::uint32_t GrammarMatcher::after(std::uint32_t node) {
    const auto [position, below] = nodes_[node];
    return rules_.at(position + 1).kind == Kind::end ? below : intern(position + 1, below);
}

// Replaces rules on top of the stacks of todo_ by what they begin with, until all in reached_ have something else there.
void GrammarMatcher::expand() {
    expansion_++;
    while (!todo_.empty()) {
        const std::uint32_t node = todo_.back();
        todo_.pop_back();
        if (seen_[node] == expansion_) {
            continue;
        }
        seen_[node] = expansion_;
        const Element element = top(node);
        if (element.kind != Kind::rule) {
            spend(1);
            reached_.emplace_back(key_of(element), node);
            continue;
        }
        const std::uint32_t below = after(node);
        const auto alternatives = rules_.alternatives(element.value);
        spend(static_cast<std::size_t>(alternatives.last - alternatives.first) + 1);
        for (const std::uint32_t alternative : alternatives) {
            todo_.push_back(rules_.at(alternative).kind == Kind::end ? below : intern(alternative, below));
        }
    }
}

// The state of the stacks in reached_.
std::uint32_t GrammarMatcher::intern_state() {
    if (reached_.empty()) {
        return kNoStack;
    }
    std::sort(reached_.begin(), reached_.end());
    reached_.erase(std::unique(reached_.begin(), reached_.end()), reached_.end());
    std::uint64_t hash = 0;
    for (const auto& [element, node] : reached_) {
        hash = mixed(hash ^ node);
    }
    const auto [first, last] = state_table_.equal_range(hash);
    for (auto known = first; known != last; ++known) {
        const State& state = states_[known->second];
        const auto same = [](std::uint32_t node, const auto& reached) { return node == reached.second; };
        if (std::equal(state_nodes_.begin() + state.begin, state_nodes_.begin() + state.end, reached_.begin(), reached_.end(), same)) {
            reached_.clear();
            return known->second;
        }
    }
    spend(kEntrySteps);
    State state{};
    state.begin = static_cast<std::uint32_t>(state_nodes_.size());
    state.groups_begin = static_cast<std::uint32_t>(groups_.size());
    for (std::size_t i = 0; i < reached_.size(); i++) {
        const auto [element, node] = reached_[i];
        state_nodes_.push_back(node);
        const auto end = static_cast<std::uint32_t>(state_nodes_.size());
        if (i > 0 && reached_[i - 1].first == element) {
            groups_.back().end = end;
            continue;
        }
        const Element element_on_top = top(node);
        groups_.push_back({element_on_top, end - 1, end});
        state.complete = state.complete || element_on_top.kind == Kind::end;
        state.has_tokens = state.has_tokens || takes_tokens(element_on_top.kind);
    }
    state.end = static_cast<std::uint32_t>(state_nodes_.size());
    state.groups_end = static_cast<std::uint32_t>(groups_.size());
    reached_.clear();
    const auto added = static_cast<std::uint32_t>(states_.size());
    states_.push_back(state);
    state_table_.emplace(hash, added);
    return added;
}

std::uint32_t GrammarMatcher::step(std::uint32_t state, std::uint32_t character) {
    if (character >= 128) {
        const std::uint64_t key = pair_of(state, rules_.interval(character));
        auto known = next_.find(key);
        if (known == next_.end()) {
            spend(kEntrySteps);
            known = next_.emplace(key, compute_step(state, character)).first;
        }
        return known->second;
    }
    Row* row = states_[state].next;
    if (row == nullptr) {
        spend(kRowSteps);
        row = &rows_.emplace_back();
        row->fill(kUnknown);
        states_[state].next = row;
    }
    if ((*row)[character] == kUnknown) {
        const std::uint32_t next = compute_step(state, character);
        const CharacterSet::Ascii alike = characters_like(state, character);
        for (std::uint32_t other = 0; other < row->size(); other++) {
            if ((alike[other / 64] >> (other % 64) & 1) != 0) {
                (*row)[other] = next;
            }
        }
    }
    return (*row)[character];
}

// ASCII characters that are in the same sets on top of the state's stacks as this one.
CharacterSet::Ascii GrammarMatcher::characters_like(std::uint32_t state, std::uint32_t character) const {
    CharacterSet::Ascii alike{~std::uint64_t{0}, ~std::uint64_t{0}};
    for (std::uint32_t i = states_[state].groups_begin; i < states_[state].groups_end; i++) {
        if (groups_[i].top.kind == Kind::characters) {
            const CharacterSet& set = rules_.set(groups_[i].top.value);
            const std::uint64_t flip = set.contains(character) ? 0 : ~std::uint64_t{0};
            alike[0] &= set.ascii()[0] ^ flip;
            alike[1] &= set.ascii()[1] ^ flip;
        }
    }
    return alike;
}

std::uint32_t GrammarMatcher::compute_step(std::uint32_t state, std::uint32_t character) {
    const auto [groups_begin, groups_end] = std::make_pair(states_[state].groups_begin, states_[state].groups_end);
    spend(groups_end - groups_begin);
    for (std::uint32_t i = groups_begin; i < groups_end; i++) {
        const Group& group = groups_[i];
        if (group.top.kind != Kind::characters || !rules_.set(group.top.value).contains(character)) {
            continue;
        }
        spend(group.end - group.begin);
        for (std::uint32_t at = group.begin; at < group.end; at++) {
            todo_.push_back(after(state_nodes_[at]));
        }
    }
    expand();
    return intern_state();
}

// Whether some stack may go on with what the character may become.
bool GrammarMatcher::overlaps(std::uint32_t state, const PartialCharacter& partial) {
    spend((states_[state].groups_end - states_[state].groups_begin) / kGroupsPerStep);
    return std::any_of(groups_.begin() + states_[state].groups_begin, groups_.begin() + states_[state].groups_end, [&](const Group& group) {
        return group.top.kind == Kind::characters && rules_.set(group.top.value).overlaps(partial.first, partial.last);
    });
}

// Reads one byte; false: no stack is left.
bool GrammarMatcher::advance(Position& position, unsigned char byte) {
    if (position.partial.missing == 0 && byte < 0x80) {
        position.state = step(position.state, byte);
        return position.state != kNoStack;
    }
    if (!position.partial.add(byte)) {
        return false;
    }
    if (position.partial.missing > 0) {
        return overlaps(position.state, position.partial);
    }
    position.state = step(position.state, position.partial.first);
    return position.state != kNoStack;
}

bool GrammarMatcher::advance(Position& position, std::string_view text) {
    return std::all_of(text.begin(), text.end(), [&](char byte) { return advance(position, static_cast<unsigned char>(byte)); });
}

// Tokens without text are none of a grammar's, and no grammar can name the NUL.
bool GrammarMatcher::usable(std::int32_t token) const {
    const auto text = tokens_->text(token);
    return !text.empty() && text.find('\0') == std::string_view::npos && !tokens_->is_end(token) && (names_tokens_ || !tokens_->is_control(token));
}

bool GrammarMatcher::may_end() const {
    return states_[position_.state].complete && position_.partial.missing == 0;
}

// Puts what follows a token that elements take whole into reached_. When the text ends within a character, only more such elements can
// take the rest.
void GrammarMatcher::reach_behind(const Group& group, bool whole) {
    spend(group.end - group.begin);
    const auto [begin, end] = std::make_pair(group.begin, group.end);
    for (std::uint32_t at = begin; at < end; at++) {
        todo_.push_back(after(state_nodes_[at]));
    }
    expand();
    if (!whole) {
        const auto other = [](const auto& reached) { return !takes_tokens(static_cast<Kind>(reached.first >> 32)); };
        reached_.erase(std::remove_if(reached_.begin(), reached_.end(), other), reached_.end());
    }
}

bool GrammarMatcher::leads_on(const Group& group, bool whole) {
    reach_behind(group, whole);
    const bool any = !reached_.empty();
    reached_.clear();
    return any;
}

bool GrammarMatcher::allows(std::int32_t token) {
    if (tokens_->is_end(token)) {
        return may_end();
    }
    if (!usable(token)) {
        return false;
    }
    Position position = position_;
    if (advance(position, tokens_->text(token))) {
        return true;
    }
    const State state = states_[position_.state];
    PartialCharacter partial = position_.partial;
    if (!state.has_tokens || !partial.add(tokens_->text(token))) {
        return false;
    }
    for (std::uint32_t i = state.groups_begin; i < state.groups_end; i++) {
        if (takes(groups_[i].top, token) && leads_on(groups_[i], partial.missing == 0)) {
            return true;
        }
    }
    return false;
}

std::vector<bool> GrammarMatcher::allowed() {
    std::vector<bool> allowed(tokens_->size());
    const auto set = [&allowed](std::int32_t token, bool value) { allowed[static_cast<std::size_t>(token)] = value; };
    const auto& nodes = tokens_->nodes();
    std::vector<Position> path(tokens_->depth() + 1);
    path[0] = position_;
    for (std::size_t i = 0; nodes[i].depth > 0;) {
        Position& position = path[nodes[i].depth] = path[nodes[i].depth - 1];
        if (!advance(position, static_cast<unsigned char>(nodes[i].byte))) {
            i = nodes[i].end;
            continue;
        }
        const auto last = nodes[i + 1].first_token;
        for (auto at = nodes[i].first_token; at < last; at++) {
            set(tokens_->tokens()[at], true);
        }
        i++;
    }
    if (states_[position_.state].has_tokens) {
        add_tokens(allowed);
    }
    for (const auto token : tokens_->control_tokens()) {
        set(token, names_tokens_ && allowed[static_cast<std::size_t>(token)]);
    }
    for (const auto token : tokens_->end_tokens()) {
        set(token, may_end());
    }
    return allowed;
}

// Those that elements take whole. There may be as many elements as tokens: they are not compared one by one.
void GrammarMatcher::add_tokens(std::vector<bool>& allowed) {
    struct Others {
        std::size_t count = 0;  // elements that take all tokens but one
        std::uint32_t but = 0;  // the last one's
    };
    std::array<Others, 2> others;  // of tokens that end within a character, and of whole ones
    const State state = states_[position_.state];
    for (std::uint32_t i = state.groups_begin; i < state.groups_end; i++) {
        const auto [kind, value] = groups_[i].top;
        if (kind == Kind::token && value < allowed.size() && !allowed[value]) {
            PartialCharacter partial = position_.partial;
            const auto token = static_cast<std::int32_t>(value);
            allowed[value] = usable(token) && partial.add(tokens_->text(token)) && leads_on(groups_[i], partial.missing == 0);
        }
        for (std::size_t whole = 0; whole < others.size() && kind == Kind::other_token; whole++) {
            if (leads_on(groups_[i], whole != 0)) {
                others[whole].count++;
                others[whole].but = value;
            }
        }
    }
    for (std::size_t at = 0; at < allowed.size() && others[0].count + others[1].count > 0; at++) {
        const auto token = static_cast<std::int32_t>(at);
        PartialCharacter partial = position_.partial;
        if (!allowed[at] && usable(token) && partial.add(tokens_->text(token))) {
            const Others& taking = others[partial.missing == 0 ? 1 : 0];
            allowed[at] = taking.count > 1 || (taking.count == 1 && taking.but != at);
        }
    }
}

bool GrammarMatcher::accept(std::int32_t token, std::string_view text) {
    budget_ = std::min(budget_ + kBudget, kMaxBudget);
    if (tokens_->is_end(token)) {
        return may_end();
    }
    PartialCharacter partial = position_.partial;
    if (!partial.add(text)) {
        return false;
    }
    const State before = states_[position_.state];
    Position position = position_;
    const bool alive = advance(position, text);
    if (before.has_tokens || (alive && partial.missing > 0 && states_[position.state].has_tokens)) {
        for (std::uint32_t i = before.groups_begin; i < before.groups_end; i++) {
            if (takes(groups_[i].top, token)) {
                reach_behind(groups_[i], partial.missing == 0);
            }
        }
        const State after = states_[alive ? position.state : kNoStack];
        for (std::uint32_t i = after.groups_begin; i < after.groups_end; i++) {
            const Group& group = groups_[i];
            // No token goes on with a character that a set of characters is to take.
            if (group.top.kind != Kind::characters && partial.missing > 0) {
                continue;
            }
            for (std::uint32_t at = group.begin; at < group.end; at++) {
                reached_.emplace_back(key_of(group.top), state_nodes_[at]);
            }
        }
        position_ = {intern_state(), partial};
    } else {
        position_ = alive ? position : Position{};
    }
    compact();
    return position_.state != kNoStack;
}

// Forgets all but the stacks that there are.
void GrammarMatcher::compact() {
    if (memory() < compact_at_) {
        return;
    }
    const State state = states_[position_.state];
    const std::vector<std::uint32_t> stacks(state_nodes_.begin() + state.begin, state_nodes_.begin() + state.end);
    const std::vector<Node> old = std::move(nodes_);
    const std::int64_t budget = std::exchange(budget_, std::numeric_limits<std::int64_t>::max());  // none of it is the grammar's doing
    begin();
    std::vector<std::uint32_t> renamed(old.size(), kUnknown);
    renamed[kEmpty] = kEmpty;
    std::vector<std::uint32_t> path;
    for (const std::uint32_t stack : stacks) {
        for (std::uint32_t node = stack; renamed[node] == kUnknown; node = old[node].below) {
            path.push_back(node);
        }
        for (; !path.empty(); path.pop_back()) {
            const auto [position, below] = old[path.back()];
            renamed[path.back()] = intern(position, renamed[below]);
        }
        reached_.emplace_back(key_of(top(renamed[stack])), renamed[stack]);
    }
    position_.state = intern_state();
    budget_ = budget;
    compact_at_ = std::max(kCompactAt, 2 * memory());
}

std::size_t GrammarMatcher::memory() const {
    constexpr std::size_t kEntry = 48;  // of a hash table, about
    return nodes_.size() * (sizeof(Node) + sizeof(std::uint32_t)) + node_table_.size() * sizeof(std::uint32_t) +
           states_.size() * (sizeof(State) + kEntry) + state_nodes_.size() * sizeof(std::uint32_t) + groups_.size() * sizeof(Group) +
           rows_.size() * sizeof(Row) + next_.size() * kEntry;
}

}  // namespace llama_moe
